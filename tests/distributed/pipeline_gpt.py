"""A tiny GPT at any parallel layout, with the same values and steps at all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import nn

import dora_fx
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.megatron.world import megatron_world
from dora_fx.models import causal_mask
from dora_fx.models.specs import FrozenRMSNorm
from tests.distributed.zoo import Sharding, shardings, sites_of, split, tensors_of, whole_values

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB, DIM = 4, 32, 48, 8, 4, 64, 4
EXPERTS, EXPERT_FFN = 4, 24
MICRO_BATCHES = 4
# Forward and backward of what a step sums over; each step adds its own to what it trains.
ROUNDINGS_OF_A_STEP = 3 * LAYERS * (5 * HIDDEN + FFN + 4 * DIM)
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(frozen=True)
class Layout:
    """Sizes of a world; `vpp` is the number of model chunks of each pipeline rank.

    The ranks of `tp` times `dp` hold experts in another order: `etp` share each, and `ep` hold others. `etp` is `tp`
    where it is 0.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        experts = f"-ep{self.ep}-etp{self.etp or self.tp}" if self.ep > 1 or self.etp else ""
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}" + (f"-vpp{self.vpp}" if self.vpp > 1 else "") + experts

    @contextmanager
    def world(self, rank: int, store: Path) -> Iterator[None]:
        """Be one rank of a world of this layout."""
        with megatron_world(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp or None,
            store=dist.FileStore(str(store), self.world_size),
            global_rank=rank,
            world_size=self.world_size,
        ):
            yield


@dataclass(frozen=True)
class Kind:
    """What is trained, and by which of Megatron's optimizers: fp32, bf16 (float32 main copies) or distributed."""

    gated: bool = True
    sequence_parallel: bool = False
    optimizer: str = "fp32"
    experts: bool = False

    def __str__(self) -> str:
        mlp = "moe" if self.experts else "gated" if self.gated else "plain"
        return f"{mlp}{'-sp' if self.sequence_parallel else ''}-{self.optimizer}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.optimizer == "fp32" else torch.bfloat16


def build_base(layout: Layout, kind: Kind, num_layers: int = LAYERS) -> list[GPTModel]:
    """This rank's chunks of the base, with weights that depend on nothing but their place in the model."""
    activation: dict[str, Any] = {"gated_linear_unit": True, "activation_func": F.silu} if kind.gated else {}
    experts = dict(
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_ffn_hidden_size=EXPERT_FFN,
        moe_shared_expert_intermediate_size=FFN,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp or layout.tp,
        # Megatron makes buffers of the wrong dtype of fused additions of biases on a CPU.
        bias_dropout_fusion=False,
    )
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_dtype=kind.dtype,
        batch_p2p_comm=False,
        params_dtype=kind.dtype,
        bf16=kind.dtype is torch.bfloat16,
        sequence_parallel=kind.sequence_parallel and layout.tp > 1,
        **(activation | experts if kind.experts else activation),
    )
    chunks = [_build_chunk(config, layout, stage) for stage in range(layout.vpp)]
    for chunk in chunks:
        chunk.to(kind.dtype)
        _set_base_values(chunk)
    return chunks


def _build_chunk(config: TransformerConfig, layout: Layout, stage: int) -> GPTModel:
    vp_stage = stage if layout.vpp > 1 else None
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = FrozenRMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([layer] * num_layers, FrozenRMSNorm),
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=first(ignore_virtual=True) and stage == 0,
        post_process=last(ignore_virtual=True) and stage == layout.vpp - 1,
        vp_stage=vp_stage,
    )


def attach(
    chunks: list[GPTModel], dim: int = DIM, alpha: float = 8, targets: list[str] = TARGETS, **dora: Any
) -> list[nn.Module]:
    """Adapters on every chunk, untrained."""
    return dora_fx.DoRA(target_modules=targets, dim=dim, alpha=alpha, **dora)(chunks)


def name_of(chunk: GPTModel, path: str) -> str:
    """A module's path with its layer's and its expert's number in the whole model."""
    parts = path.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    if "local_experts" in parts[:-1]:
        place = parts.index("local_experts") + 1
        num_local = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
        parts[place] = str(int(parts[place]) + num_local * parallel_state.get_expert_model_parallel_rank())
    return ".".join(parts)


def _own(shape: tuple[int, ...], sharding: Sharding, name: str, std: float) -> torch.Tensor:
    """This rank's part of the whole tensor of a name, for a parameter of a shape."""
    whole = list(shape)
    if ".local_experts." in name:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    if sharding.dim is not None:
        whole[sharding.dim] *= group.size()
    return split(whole_values(tuple(whole), name, std), sharding.dim, group.rank(), group.size(), sharding.blocks)


@torch.no_grad()
def _set_base_values(chunk: GPTModel) -> None:
    for path, module in chunk.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            # The embedding's rows are its vocabulary, sharded as a column layer's.
            is_linear = hasattr(module, "input_size")
            is_router = path.endswith(".router")
            sharding = shardings(path, module)["weight"] if is_linear else Sharding(None if is_router else 0)
            name = name_of(chunk, path)
            weight.copy_(_own(tuple(weight.shape), sharding, f"{name}.weight", HIDDEN**-0.5))


TRAINED = {"lora_a": HIDDEN**-0.5, "lora_b": 0.2, "magnitude": 1.0}


def trained_parameters(chunks: list[Any]) -> Iterator[tuple[str, nn.Parameter, Sharding]]:
    """(name in the whole model, parameter, its sharding) for everything that is trained on this rank."""
    for chunk in map(unwrapped, chunks):
        for path, site in sites_of(chunk).items():
            rules, tensors = shardings(path, site.to_wrap), tensors_of(site)
            for part in TRAINED:
                yield f"{name_of(chunk, path)}.{part}", tensors[part], rules[part]


def unwrapped(chunk: Any) -> GPTModel:
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


@torch.no_grad()
def set_adapter_values(chunks: list[nn.Module], layout: Layout, salt: str = "") -> None:
    """Values that depend on the parameter's name and the salt alone; magnitudes are positive."""
    for name, parameter, sharding in trained_parameters(chunks):
        std = TRAINED[name.rpartition(".")[2]]
        value = _own(tuple(parameter.shape), sharding, f"{name}{salt}", std)
        parameter.copy_(value.abs() + 0.5 if name.endswith("magnitude") else value)


class Training:
    """Chunks, wrapped as Megatron wraps them, with an optimizer.

    Its steps take gradients that depend on nothing but the parameter's name and the number of the step, so that
    values and moments are bitwise the same at every layout.

    Args:
        salt: of the adapters' values.
        overlap_grad_reduce: reduce gradients over data-parallel ranks while Megatron's schedule still runs.
        chunks: bare ones with an active adapter, in place of new ones with that of `salt` and `dora`.
        dora: settings of `DoRA`.
    """

    def __init__(
        self,
        layout: Layout,
        kind: Kind,
        salt: str = "",
        *,
        overlap_grad_reduce: bool = False,
        chunks: list[Any] | None = None,
        **dora: Any,
    ) -> None:
        self.layout, self.kind = layout, kind
        if chunks is None:
            chunks = attach(build_base(layout, kind), **dora)
            set_adapter_values(chunks, layout, salt)
        distributed = kind.optimizer == "distributed"
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.01,
            clip_grad=0.0,
            params_dtype=kind.dtype,
            bf16=kind.dtype is torch.bfloat16,
            use_distributed_optimizer=distributed,
        )
        with cuda_means_cpu():
            config = chunks[0].config
            if kind.dtype is torch.bfloat16:
                chunks = [Float16Module(config, chunk) for chunk in chunks]
            ddp = DistributedDataParallelConfig(
                use_distributed_optimizer=distributed, overlap_grad_reduce=overlap_grad_reduce
            )
            # A module's magnitude that Float16Module cast is float32 again.
            self.chunks = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
            self.optimizer = get_megatron_optimizer(settings, self.chunks)
        if overlap_grad_reduce:
            # As Megatron's own training does.
            functions = [(chunk.no_sync, chunk.start_grad_sync) for chunk in self.chunks]
            no_sync, start_grad_sync = zip(*functions, strict=True)
            is_interleaved = layout.vpp > 1
            config.no_sync_func = list(no_sync) if is_interleaved else no_sync[0]
            config.grad_sync_func = list(start_grad_sync) if is_interleaved else start_grad_sync[0]

    def train(self, number: int) -> float:
        """One update by the loss of a batch, in micro-batches through Megatron's pipeline schedule.

        Each data-parallel rank takes its part of the batch. Returns the loss of the whole batch, on every rank.
        """
        tokens = torch.randint(0, VOCAB, (8, 17), generator=torch.Generator().manual_seed(number))
        own = tokens.chunk(self.layout.dp)[parallel_state.get_data_parallel_rank()]
        micro_batches = own.chunk(MICRO_BATCHES)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        data = [iter(micro_batches) for _ in self.chunks]
        with cuda_means_cpu():
            found = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=data if self.layout.vpp > 1 else data[0],
                model=self.chunks if self.layout.vpp > 1 else self.chunks[0],
                num_microbatches=MICRO_BATCHES,
                seq_length=tokens.shape[1] - 1,
                micro_batch_size=len(micro_batches[0]),
                forward_only=False,
            )
            finalize_model_grads(self.chunks)
            self.optimizer.step()
        # The last stages have losses, the same on all ranks of a tensor-parallel group.
        total = torch.tensor(sum(map(float, found)), dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / (MICRO_BATCHES * self.layout.dp * self.layout.tp)

    def step(self, number: int) -> None:
        """One update by gradients that are the same at every layout."""
        for name, parameter, sharding in trained_parameters(self.chunks):
            value = _own(tuple(parameter.shape), sharding, f"{name} gradient {number}", 1.0)
            parameter.main_grad.copy_(value)
        with cuda_means_cpu():
            self.optimizer.step()


def _forward_step(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Megatron's forward step: a chunk's output for the next micro-batch, and the loss of the last chunk's."""
    tokens = next(batches)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    output = chunk(inputs, positions, causal_mask(inputs.shape[1], "cpu"), labels=targets)
    return output, lambda losses: (losses.mean(), losses.detach().mean())


def linear_sizes(kind: Kind) -> dict[str, tuple[int, int]]:
    """Output and input features of the adapted layers, by their path in a layer; experts' have no number."""
    mlp = "mlp.shared_experts" if kind.experts else "mlp"
    blocks = 2 if kind.gated else 1
    sizes = {
        "self_attention.linear_qkv": (HIDDEN + 2 * GROUPS * (HIDDEN // HEADS), HIDDEN),
        "self_attention.linear_proj": (HIDDEN, HIDDEN),
        f"{mlp}.linear_fc1": (blocks * FFN, HIDDEN),
        f"{mlp}.linear_fc2": (HIDDEN, FFN),
    }
    if kind.experts:
        sizes |= {
            f"{_EXPERTS}.linear_fc1": (blocks * EXPERT_FFN, HIDDEN),
            f"{_EXPERTS}.linear_fc2": (HIDDEN, EXPERT_FFN),
        }
    return sizes


# Megatron's key of all experts of a layer.
_EXPERTS = "mlp.experts.experts"


def _of_layers(shape: tuple[int, ...], name: str, std: float) -> torch.Tensor:
    return torch.stack([_of_layer(shape, f"decoder.layers.{layer}.{name}", std) for layer in range(LAYERS)])


def _of_layer(shape: tuple[int, ...], name: str, std: float) -> torch.Tensor:
    if _EXPERTS not in name:
        return whole_values(shape, name, std)
    names = [name.replace(_EXPERTS, f"mlp.experts.local_experts.{expert}") for expert in range(EXPERTS)]
    return torch.stack([whole_values(shape, name, std) for name in names])


def expected_adapters(kind: Kind, salt: str = "") -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint of `set_adapter_values`, by key, layers in front."""
    expected = {}
    for path, (rows, columns) in linear_sizes(kind).items():
        key = f"decoder.layers.{path}.adapter"
        lora_a = _of_layers((DIM, columns), f"{path}.lora_a{salt}", TRAINED["lora_a"])
        lora_b = _of_layers((rows, DIM), f"{path}.lora_b{salt}", TRAINED["lora_b"])
        magnitude = _of_layers((rows,), f"{path}.magnitude{salt}", TRAINED["magnitude"]).abs() + 0.5
        expected[f"{key}.linear_in.weight"] = lora_a.to(kind.dtype)
        expected[f"{key}.linear_out.weight"] = lora_b.to(kind.dtype)
        expected[f"{key}.weight_magnitude"] = magnitude.float()
    return expected


def expected_norms(kind: Kind) -> dict[str, torch.Tensor]:
    """The magnitudes of adapters that were just attached, by key: the row norms of the whole base weights."""
    return {
        f"decoder.layers.{path}.adapter.weight_magnitude": _of_layers(size, f"{path}.weight", HIDDEN**-0.5).norm(dim=-1)
        for path, size in linear_sizes(kind).items()
    }
