"""Build a Megatron-Core GPTModel (local spec) and copy a Hugging Face checkpoint into it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_fx.models.architecture import GPTArchitecture, architecture_of, with_query_groups
from dora_fx.models.layer_tensors import hf_layer_names, megatron_layer_tensors, shard_of

logger = logging.getLogger(__name__)


def build_gpt_model(
    config: Any,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    num_query_groups: int | None = None,
) -> nn.Module:
    """A Megatron GPTModel that computes what the Hugging Face model computes.

    Megatron's model-parallel groups must exist (`dora_fx.megatron_world`); each tensor-parallel rank keeps its
    shards. Logits are `[b, s, vocab/tp]`. Pass `causal_mask(s, device)` as the attention mask.

    Args:
        config: the checkpoint's transformers config.
        state_dict: the checkpoint's tensors, as the transformers model names them.
        dtype: of the parameters, float32 or bfloat16.
        device: "cpu" or "cuda" (the current device).
        num_query_groups: pad with zero query groups up to this number, for tensor-parallel sizes that do not
            divide the model's own; the function stays the same.

    Raises:
        UnsupportedModelError: the config has something that this model would compute differently.
        ValueError: the checkpoint's tensors are not those of its config; the message names them.
    """
    architecture = architecture_of(config)
    if num_query_groups is not None:
        architecture = with_query_groups(architecture, num_query_groups)
    _check_names(architecture, state_dict)
    model = _empty_gpt_model(architecture, dtype, device)
    _copy_weights(architecture, state_dict, model)
    return model


def causal_mask(sequence_length: int, device: torch.device | str) -> Tensor:
    """Megatron's boolean mask `[1, 1, s, s]`, True where a position must not look.

    Without one Megatron makes its own, on CUDA whatever the model's device.
    """
    ones = torch.ones(1, 1, sequence_length, sequence_length, dtype=torch.bool, device=device)
    return ones.triu(diagonal=1)


def _empty_gpt_model(architecture: GPTArchitecture, dtype: torch.dtype, device: str) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = _transformer_config(architecture, dtype, device)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=architecture.qk_layernorm)
    # Named here because Megatron would take Transformer Engine's final norm wherever that is installed.
    block = TransformerBlockSubmodules(layer_specs=[layer] * architecture.num_layers, layer_norm=WrappedTorchNorm)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.llama3_rope_factor is not None,
        rope_scaling_factor=architecture.llama3_rope_factor or 1.0,
        seq_len_interpolation_factor=architecture.linear_rope_factor,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
    )
    # Norms are built on CPU wherever the rest is.
    return model.to(device=device, dtype=dtype)


def _transformer_config(architecture: GPTArchitecture, dtype: torch.dtype, device: str) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
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
        qk_layernorm=architecture.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=device == "cpu",
        init_method=_keep_as_allocated,
        output_layer_init_method=_keep_as_allocated,
    )


def _keep_as_allocated(weight: Tensor) -> Tensor:
    """Initialise nothing: every weight is copied in, but `perform_initialization` also sets shard attributes."""
    return weight


def _check_names(architecture: GPTArchitecture, state_dict: Mapping[str, Tensor]) -> None:
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names = hf_layer_names(architecture)
    expected |= {f"model.layers.{i}.{name}" for i in range(architecture.num_layers) for name in names}
    missing, unexpected = expected - set(state_dict), set(state_dict) - expected
    if architecture.tied_embeddings:
        missing.discard("lm_head.weight")
    if missing or unexpected:
        raise ValueError(
            "the checkpoint's tensors are not those of its config: "
            f"missing {_some(missing)}; without a place in the model: {_some(unexpected)}"
        )


def _some(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:5]) or "none"
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed


def _full_tensors(
    architecture: GPTArchitecture, state_dict: Mapping[str, Tensor], layer_indices: Mapping[int, int]
) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, full tensor) for the whole model, a layer at a time."""
    yield "embedding.word_embeddings.weight", state_dict["model.embed_tokens.weight"]
    for local, index in layer_indices.items():
        prefix = f"model.layers.{index}."
        hf = {name: state_dict[prefix + name] for name in hf_layer_names(architecture)}
        for name, tensor in megatron_layer_tensors(architecture, hf).items():
            yield f"decoder.layers.{local}.{name}", tensor
    yield "decoder.final_layernorm.weight", state_dict["model.norm.weight"]
    if not architecture.tied_embeddings:
        yield "output_layer.weight", state_dict["lm_head.weight"]


@torch.no_grad()
def _copy_weights(architecture: GPTArchitecture, state_dict: Mapping[str, Tensor], model: Any) -> None:
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    layer_indices = {local: layer.layer_number - 1 for local, layer in enumerate(model.decoder.layers)}
    parameters = dict(model.named_parameters())
    for name, full in _full_tensors(architecture, state_dict, layer_indices):
        parameter = parameters.pop(name)
        if getattr(parameter, "tensor_model_parallel", False):
            full = shard_of(name, full, parameter.partition_dim, tp_rank, tp_size)
        if full.shape != parameter.shape:
            raise ValueError(f"{name}: the checkpoint has {tuple(full.shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(full)
    if parameters:
        raise ValueError(f"the checkpoint has no tensor for {_some(set(parameters))}")
    logger.info("copied %d layers of tensor-parallel rank %d of %d", len(layer_indices), tp_rank, tp_size)
