"""Checks a Megatron configuration for settings that change what a layer computes or the order of fused rows.

Every supported architecture is a decoder with RMSNorm, rotary positions, softmax attention and a SwiGLU MLP, or experts
that are such MLPs behind a router. A setting that makes it compute something else, or that orders the rows of
linear_qkv or linear_fc1 in another way, is refused for every exchange with Hugging Face. So is a setting that no table
here has, unless it has its default: it came with a later megatron-core, and its effect is unknown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from torch.nn import functional

# attention_output_gate adds a gate as wide as the queries to linear_qkv, and rotary_interleaved changes the order of
# the rows of a head. The others change what a layer computes.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "gated_linear_unit": (True,),
    "activation_func": (functional.silu,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "add_bias_linear": (False,),
    "normalization": ("RMSNorm",),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "rotary_interleaved": (False,),
    "no_rope_freq": (None, 0),
    "mrope_section": (None,),
    "heterogeneous_block_specs": (False,),
    "use_mup": (False,),
}
# Those of a model with experts: each token goes to some of them, by a softmax, and to no other MLP.
_EXPECTED_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_force_load_balancing": (False,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_input_jitter_eps": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    # It changes the order of the rows of linear_fc1.
    "moe_mlp_glu_interleave_size": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_router_force_biased": (None,),
}
# Attributes of the model itself; rotary_percent is the share of a head that is rotated.
_EXPECTED_OF_MODEL: dict[str, tuple[Any, ...]] = {"position_embedding_type": ("rope", "yarn"), "rotary_percent": (1.0,)}
# Settings that may have any value: sizes and numbers that are read or that a base's own config has as well, and
# settings of training, precision, speed and parallelism.
_KNOWN = {
    *(
        "num_moe_experts",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ),
    *("softmax_scale", "qk_layernorm", "add_qkv_bias", "layernorm_epsilon", "layernorm_zero_centered_gamma"),
    *("window_size", "window_attn_skip_freq", "is_hybrid_model", "attention_dropout", "hidden_dropout"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "cp_comm_type"),
    *("attention_backend", "flash_attention_version", "flash_decode", "transformer_impl", "batch_invariant_mode"),
    *("fp32_residual_connection", "attention_softmax_in_fp32", "apply_query_key_layer_scaling", "quant_recipe"),
    *("disable_bf16_reduced_precision_matmul", "bias_activation_fusion", "bias_dropout_fusion", "persist_layer_norm"),
    *("masked_softmax_fusion", "memory_efficient_layer_norm", "apply_rope_fusion", "fused_single_qkv_rope"),
    *("fused_residual_rmsnorm", "use_fused_weighted_squared_relu", "use_transformer_engine_op_fuser"),
    *("use_te_activation_func", "use_te_rng_tracker", "use_inference_optimized_layers", "symmetric_ar_type"),
    *("activation_func_fp8_input_store", "first_last_layers_bf16", "tp_only_amax_red", "use_kitchen"),
    *("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "use_kitchen_attention", "kitchen_attention_backend"),
    *("disable_parameter_transpose_cache", "clone_scatter_output_in_embedding", "config_logger_dir", "test_mode"),
    *("calculate_per_token_loss", "output_layer_init_method", "qk_clip", "qk_clip_alpha", "qk_clip_threshold"),
    *("log_max_attention_logit", "distribute_saved_activations", "enable_cuda_graph", "external_cuda_graph"),
    *(
        "fine_grained_activation_offloading",
        "offload_modules",
        "min_offloaded_tensor_size",
        "nccl_all_reduce_for_prefill",
    ),
    *("delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction"),
    *("fine_grained_offloading_max_inflight_offloads", "high_priority_a2a_comm_stream", "cache_mla_latents"),
    *("mla_down_proj_fusion", "use_grouped_gemm_for_shared_expert", "use_grouped_gemm_for_dense_mlp"),
    *("hetereogenous_dist_checkpoint", "experimental_attention_variant_loss_scale_func", "use_mamba_mem_eff_path"),
    *("mlp_chunks_for_prefill", "mlp_chunks_for_training"),
}
# Beginnings of the names of settings for layers that no model here has, and for ways to compute the same.
_KNOWN_STARTS = (
    *("moe_", "mamba_", "dsa_", "linear_", "mtp_", "mup_", "fp8", "fp4", "init_", "embedding_init_method"),
    *("cuda_graph_", "inference_", "recompute_"),
)


def check_settings(config: Any, model: Any) -> None:
    """Check that a Megatron model's settings are those of the supported architectures.

    Args:
        config: its TransformerConfig, or a config with the same fields.
        model: the model, which has the settings of its positions.

    Raises:
        ValueError: naming the setting, the value found and the value expected.
    """
    for name, expected in _EXPECTED.items():
        _check(config, name, expected)
    for name, expected in _EXPECTED_OF_MODEL.items():
        _check(model, name, expected)
    if getattr(config, "num_moe_experts", None):
        _check_experts(config)
    _check_scale(config)
    for name, default in unknown_settings():
        if getattr(config, name, default) != default:
            raise ValueError(
                f"the model's config has {name} = {_shown(getattr(config, name))}, a setting that is not known here, "
                f"expected {_shown(default)}, its default"
            )


def unknown_settings() -> Iterator[tuple[str, Any]]:
    """Yield names and defaults of the installed megatron-core's settings that no table here has."""
    from megatron.core.transformer import TransformerConfig

    # Inherited settings are those of parallelism, which do not change what a layer computes.
    for field in dataclasses.fields(TransformerConfig):
        is_known = field.name in _EXPECTED or field.name in _KNOWN or field.name.startswith(_KNOWN_STARTS)
        if not is_known and field.name in TransformerConfig.__annotations__:
            factory: Any = field.default_factory
            yield field.name, field.default if factory is dataclasses.MISSING else factory()


def check_states(config: Any, *, model_type: str, qkv_bias: bool, qk_layernorm: bool, has_experts: bool) -> None:
    """Check that a model has the biases, norms and experts of the architecture that the caller names.

    Raises:
        ValueError: naming the setting that belongs to another architecture.
    """
    for name, found, expected in (
        ("qk_layernorm", getattr(config, "qk_layernorm", qk_layernorm), qk_layernorm),
        ("add_qkv_bias", getattr(config, "add_qkv_bias", qkv_bias), qkv_bias),
    ):
        if bool(found) != expected:
            raise ValueError(
                f"model_type: found {model_type!r} for a model whose config has {name} = {found!r}, expected {expected}"
            )
    num_experts = getattr(config, "num_moe_experts", None)
    if bool(num_experts) != has_experts:
        raise ValueError(
            f"model_type: found {model_type!r} for a model whose config has num_moe_experts = {num_experts}, expected "
            f"{'a number of experts' if has_experts else 'None'}"
        )


def _check(owner: Any, name: str, expected: tuple[Any, ...]) -> None:
    found = getattr(owner, name, expected[0])
    if not any(found is value or found == value for value in expected):
        raise ValueError(
            f"the model's config has {name} = {_shown(found)}, expected {' or '.join(map(_shown, expected))} as in "
            "every supported architecture"
        )


def _check_experts(config: Any) -> None:
    """Check that every layer has experts, and that the router and they compute what the architectures do."""
    for name, expected in _EXPECTED_OF_EXPERTS.items():
        _check(config, name, expected)
    frequency, balancing = config.moe_layer_freq, config.moe_router_load_balancing_type
    if frequency != 1 and (isinstance(frequency, int) or set(frequency) != {1}):
        raise ValueError(f"the model's config has moe_layer_freq = {frequency!r}, expected 1, experts in every layer")
    # Others choose experts by other numbers than the router's.
    known = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}
    if not known.issuperset([balancing] if isinstance(balancing, str) else balancing):
        raise ValueError(
            f"the model's config has moe_router_load_balancing_type = {balancing!r}, expected some of {sorted(known)}"
        )


def _check_scale(config: Any) -> None:
    """Check that attention scores are divided by the square root of a head's size, which is the default."""
    scale, size = getattr(config, "softmax_scale", None), config.kv_channels
    if scale is not None and not math.isclose(scale, size**-0.5, rel_tol=1e-6):
        raise ValueError(
            f"the model's config has softmax_scale = {scale!r}, expected None or {size**-0.5:g}, 1 / sqrt(kv_channels) "
            "as in every supported architecture"
        )


def _shown(value: Any) -> str:
    """Format a value; a function by its name, since its repr has an address."""
    return str(getattr(value, "__name__", value)) if callable(value) else repr(value)
