"""Builds Megatron models without weights, of one architecture and any of four layer specs.

local         GPTModel of torch's layers and Megatron's own linear layers
te            GPTModel of Transformer Engine's layers, whose linear layers normalise their input themselves
te_grouped    the same with experts in grouped layers, which multiply the tokens of all experts of a rank at once
hybrid        HybridModel of Transformer Engine's layers: each attention and each MLP is a layer of its own
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.megatron import ATTENTION, MLP
from dora_fx.models.architecture import GPTArchitecture

Spec = Literal["local", "te", "te_grouped", "hybrid"]
SPECS: tuple[Spec, ...] = ("local", "te", "te_grouped", "hybrid")


def default_spec(device: str) -> Spec:
    """Return "te" on CUDA if Transformer Engine is installed, and "local" otherwise."""
    return "te" if device == "cuda" and has_transformer_engine() else "local"


def check_spec(spec: Spec) -> None:
    """Raise ValueError, naming what is missing, unless models of the spec can be built in this environment."""
    if spec not in SPECS:
        raise ValueError(f"spec: found {spec!r}, expected one of {', '.join(SPECS)}")
    if spec == "hybrid" and importlib.util.find_spec("megatron.core.models.hybrid") is None:
        import megatron.core

        raise ValueError(
            f"spec {spec}: found megatron-core {megatron.core.__version__}, which has no HybridModel; expected 0.19 "
            "or newer, or spec te or local"
        )
    if spec != "local" and not has_transformer_engine():
        raise ValueError(
            f"spec {spec}: found no Transformer Engine that can be imported, expected it to be installed; install "
            "transformer-engine, or take spec local"
        )


def has_transformer_engine() -> bool:
    """Return whether Megatron could import Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def empty_model(
    architecture: GPTArchitecture, spec: Spec, dtype: torch.dtype, device: str, sequence_parallel: bool
) -> Any:
    """Build a model whose parameters are allocated but not initialised.

    Raises:
        ValueError: a HybridModel is asked for, and the architecture has experts; or grouped layers, and it has none.
    """
    if spec == "te_grouped" and not architecture.experts:
        raise ValueError(f"spec {spec}: found a model without experts, expected some; take spec te or local")
    if spec == "hybrid" and architecture.experts:
        raise ValueError(
            f"spec {spec}: found a model with {architecture.num_experts} experts in each layer, expected an MLP; take "
            "spec te or local"
        )
    settings = _transformer_settings(architecture, dtype, device, sequence_parallel)
    is_hybrid = spec == "hybrid"
    model = _hybrid_model(architecture, settings) if is_hybrid else _gpt_model(architecture, spec, settings)
    if any(parameter.dtype != dtype or parameter.device.type != device for parameter in model.parameters()):
        # The local spec builds its norms on the CPU, wherever the other layers are.
        model.to(device=device, dtype=dtype)
    return model


def empty_gpt_model(architecture: GPTArchitecture, dtype: torch.dtype, *, sequence_parallel: bool) -> Any:
    """Build this rank's part of a GPTModel of the local spec on the CPU, allocated and not initialised.

    Under FakeTensorMode it has shapes alone. Megatron's model-parallel groups must exist, and share it equally.
    """
    return empty_model(architecture, "local", dtype, "cpu", sequence_parallel)


class FrozenRMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the arguments of Megatron's norms, for a frozen weight.

    Under sequence parallelism each rank normalises its own tokens. That is complete for a frozen weight; the gradient
    of a trainable one would have to be summed over the ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _gpt_model(architecture: GPTArchitecture, spec: Spec, settings: dict[str, Any]) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from dora_fx.models.positioned_gpt import PositionedGPTModel

    # Positions that restart are for packed samples, which only the local spec can separate by a mask.
    is_local = spec == "local"
    is_grouped = spec == "te_grouped"
    layers = _local_layers(architecture) if is_local else _te_layers(architecture, grouped=is_grouped)
    return (PositionedGPTModel if is_local else GPTModel)(
        config=TransformerConfig(**settings, moe_grouped_gemm=is_grouped),
        transformer_layer_spec=layers,
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.llama3_rope_factor is not None,
        rope_scaling_factor=architecture.llama3_rope_factor or 1.0,
        seq_len_interpolation_factor=architecture.linear_rope_factor,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        **_ends_of_pipeline(),
    )


def _local_layers(architecture: GPTArchitecture) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(
        num_experts=architecture.num_experts or None,
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        qk_layernorm=architecture.hf.qk_layernorm,
    )
    # Megatron's own choice of a norm depends on other installed packages; without them it refuses sequence parallelism.
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = FrozenRMSNorm
    if architecture.hf.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = FrozenRMSNorm
    num_layers = architecture.num_layers // parallel_state.get_pipeline_model_parallel_world_size()
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=FrozenRMSNorm)


def _te_layers(architecture: GPTArchitecture, *, grouped: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=architecture.num_experts or None,
        moe_grouped_gemm=grouped,
        qk_layernorm=architecture.hf.qk_layernorm,
    )


def _hybrid_model(architecture: GPTArchitecture, settings: dict[str, Any]) -> Any:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig

    num_stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = (ATTENTION + MLP) * (architecture.num_layers // num_stages)
    model = HybridModel(
        config=TransformerConfig(**settings | {"num_layers": len(stage) * num_stages}),
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_sequence_length,
        hybrid_layer_pattern="|".join([stage] * num_stages),
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        seq_len_interpolation_factor=architecture.linear_rope_factor,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        **_ends_of_pipeline(),
    )
    if architecture.llama3_rope_factor is not None:
        model.rotary_pos_emb = _llama3_rotary(architecture, model.config)
    return model


def _ends_of_pipeline() -> dict[str, bool]:
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }


def _llama3_rotary(architecture: GPTArchitecture, config: Any) -> nn.Module:
    """Build the rotary embedding that GPTModel builds with `rope_scaling`, an option that HybridModel lacks."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert architecture.llama3_rope_factor is not None
    return RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=1.0,
        rotary_base=architecture.rotary_base,
        rope_scaling=True,
        rope_scaling_factor=architecture.llama3_rope_factor,
        use_cpu_initialization=config.use_cpu_initialization,
    )


def _transformer_settings(
    architecture: GPTArchitecture, dtype: torch.dtype, device: str, sequence_parallel: bool
) -> dict[str, Any]:
    """Return the keyword arguments of Megatron's TransformerConfig."""
    return dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        layernorm_epsilon=architecture.layernorm_epsilon,
        attention_dropout=architecture.attention_dropout,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        qk_layernorm=architecture.hf.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=architecture.hf.qkv_bias,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        # Megatron's batched exchange between stages synchronises with CUDA.
        batch_p2p_comm=device != "cpu",
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=device == "cpu",
        init_method=_keep_as_allocated,
        output_layer_init_method=_keep_as_allocated,
        **_expert_settings(architecture, device),
    )


def _expert_settings(architecture: GPTArchitecture, device: str) -> dict[str, Any]:
    """Return the settings of TransformerConfig that are of experts; none for a model without them."""
    experts = architecture.experts
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.number,
        moe_ffn_hidden_size=architecture.ffn_hidden_size,
        moe_router_topk=experts.top_k,
        # The softmax of the chosen logits is that of all, normalised.
        moe_router_pre_softmax=not experts.normalised,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        # The exchange of single tokens copies numbers between devices on streams of CUDA.
        moe_token_dispatcher_type="allgather" if device == "cpu" else "alltoall",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def _keep_as_allocated(weight: Tensor) -> Tensor:
    """Skip the initialisation, as all weights are copied in later.

    `perform_initialization=False` would skip the attributes of the shards as well.
    """
    return weight
