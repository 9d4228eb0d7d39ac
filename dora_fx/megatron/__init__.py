"""Surroundings of a model in a Megatron program: world, wrappers, optimizers, Dynamo's settings, a CPU runtime."""

from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.megatron.data_parallel import (
    check_joins_replicas,
    data_parallel_around,
    is_parameter_gather_hook,
    rebuild_gradient_buffers,
    reduces_all,
)
from dora_fx.megatron.dynamo_settings import allow_many_graphs, capture_megatron_whole
from dora_fx.megatron.expert_paths import (
    expert_number_maybe,
    expert_path_maybe,
    path_of_expert,
    with_expert_number,
)
from dora_fx.megatron.gradient_buckets import GradientBucket, find_bucket_maybe
from dora_fx.megatron.hybrid_pattern import ATTENTION, MLP, hybrid_pattern_maybe, is_attention_and_mlp
from dora_fx.megatron.layer_inputs import Arguments, need_gradient, with_gradient, without_gradient
from dora_fx.megatron.optimizer_copies import (
    MainCopy,
    copies_stepped_by,
    differing,
    main_copies,
    memory_of,
    parameters_changed_by,
    update_main_copies,
    write,
)
from dora_fx.megatron.te_classes import TE_MODULE, derives_from
from dora_fx.megatron.transformers_classes import (
    is_transformers_cache,
    is_transformers_layer,
    is_transformers_model,
)
from dora_fx.megatron.world import megatron_world, world_at_hand
from dora_fx.megatron.wrappers import (
    Model,
    ModelT,
    NamedModule,
    TorchDDP,
    check_unsharded,
    chunks_of,
    replace_modules,
    unwrap,
    walk,
)

__all__ = [
    "ATTENTION",
    "MLP",
    "TE_MODULE",
    "Arguments",
    "GradientBucket",
    "MainCopy",
    "Model",
    "ModelT",
    "NamedModule",
    "TorchDDP",
    "allow_many_graphs",
    "capture_megatron_whole",
    "check_joins_replicas",
    "check_unsharded",
    "chunks_of",
    "copies_stepped_by",
    "cuda_means_cpu",
    "data_parallel_around",
    "derives_from",
    "differing",
    "expert_number_maybe",
    "expert_path_maybe",
    "find_bucket_maybe",
    "hybrid_pattern_maybe",
    "is_attention_and_mlp",
    "is_parameter_gather_hook",
    "is_transformers_cache",
    "is_transformers_layer",
    "is_transformers_model",
    "main_copies",
    "megatron_world",
    "memory_of",
    "need_gradient",
    "parameters_changed_by",
    "path_of_expert",
    "rebuild_gradient_buffers",
    "reduces_all",
    "replace_modules",
    "unwrap",
    "update_main_copies",
    "walk",
    "with_expert_number",
    "with_gradient",
    "without_gradient",
    "world_at_hand",
    "write",
]
