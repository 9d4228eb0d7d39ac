"""Translates a Hugging Face config to Megatron's terms, and refuses features that Megatron's layers do not compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_fx.files import ExplainedError
from dora_fx.models.hf_architectures import HF_ARCHITECTURES, SUPPORTED_MODEL_TYPES, HFArchitecture

# Megatron hard-codes these three numbers of Llama 3's rotary scaling; only the factor is an option.
LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class UnsupportedModelError(ExplainedError):
    """A checkpoint uses a feature that the Megatron model built here would compute differently."""


@dataclass(frozen=True)
class Experts:
    """The experts of each layer, of which a router chooses some for a token.

    Attributes:
        number: of experts.
        top_k: how many a token goes to.
        normalised: whether the probabilities of those sum to one; else they are what the softmax over all gives them.
    """

    number: int
    top_k: int
    normalised: bool


@dataclass(frozen=True)
class GPTArchitecture:
    """Sizes and options of a decoder: RMSNorm, rotary positions, grouped-query attention and a SwiGLU MLP or experts.

    `hf` has the names of its tensors in a checkpoint and says which biases and norms it has. `ffn_hidden_size` is that
    of the MLP or of each expert, and `experts` is None for an MLP. `kv_channels` is the size of one head.
    `llama3_rope_factor` and `linear_rope_factor` are None where positions are not scaled in that way.
    """

    hf: HFArchitecture
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_sequence_length: int
    layernorm_epsilon: float
    attention_dropout: float
    tied_embeddings: bool
    rotary_base: float
    llama3_rope_factor: float | None = None
    linear_rope_factor: float | None = None
    experts: Experts | None = None

    @property
    def num_experts(self) -> int:
        """Return the number of experts in each layer; 0 for an MLP."""
        return self.experts.number if self.experts else 0

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


def architecture_of(config: Any) -> GPTArchitecture:
    """Translate the transformers config of a model type in `hf_architectures.py`.

    Raises:
        UnsupportedModelError: the model type or a feature that the config turns on is not supported. The message names
            the config's field, the value found and the values supported.
    """
    hf = HF_ARCHITECTURES.get(config.model_type)
    if hf is None:
        return _refuse("model_type", config.model_type, f"one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    _check_features(hf, config)
    factors, experts = _rope_factors(config.rope_parameters), _experts(config) if hf.router else None
    # Configs keep fields that are not theirs, so a dense model's may have a size of experts.
    has_own_size = experts is not None and hasattr(config, "moe_intermediate_size")
    return GPTArchitecture(
        hf=hf,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.moe_intermediate_size if has_own_size else config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        layernorm_epsilon=config.rms_norm_eps,
        attention_dropout=float(config.attention_dropout or 0.0),
        tied_embeddings=bool(config.tie_word_embeddings),
        rotary_base=config.rope_parameters["rope_theta"],
        experts=experts,
        **factors,
    )


def with_query_groups(architecture: GPTArchitecture, num_query_groups: int) -> GPTArchitecture:
    """Add query groups of zeros until there are `num_query_groups`; the model computes the same.

    Tensor parallelism needs a number of groups that it divides. Heads are added in proportion, because Megatron gives
    every group the same number of queries.

    Raises:
        ValueError: `num_query_groups` is less than the model has.
    """
    if num_query_groups < architecture.num_query_groups:
        raise ValueError(
            f"num_query_groups is {num_query_groups}, expected at least the model's {architecture.num_query_groups}"
        )
    return dataclasses.replace(
        architecture,
        num_query_groups=num_query_groups,
        num_attention_heads=num_query_groups * architecture.queries_per_group,
    )


def _check_features(hf: HFArchitecture, config: Any) -> None:
    if config.hidden_act != "silu":
        _refuse("hidden_act", config.hidden_act, "silu")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UnsupportedModelError(
            f"the model's weights are quantised (quantization_config, quant_method {method}), expected plain ones: "
            "Megatron's layers hold no others. Train adapters on a quantised base with transformers' Trainer, as "
            "docs/quantised.md and examples/quantised_trainer.py show"
        )
    for name in hf.unset:
        if getattr(config, name, None):
            _refuse(name, getattr(config, name), "none")
    # Some model types have a window that `use_sliding_window` turns off; others have no such switch.
    layer_types = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        _refuse("layer_types", sorted(set(layer_types)), "full_attention only")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = config.max_position_embeddings
    # A window that covers the longest text masks nothing.
    if window is not None and window < longest:
        _refuse("sliding_window", window, f"none, or at least max_position_embeddings, {longest}")
    if config.num_attention_heads % config.num_key_value_heads:
        _refuse("num_key_value_heads", config.num_key_value_heads, f"a divisor of {config.num_attention_heads}")


def _experts(config: Any) -> Experts:
    """Return the experts of a config whose router is a softmax over all of them."""
    step = getattr(config, "decoder_sparse_step", 1)
    if step != 1:
        _refuse("decoder_sparse_step", step, "1, experts in every layer")
    number, top_k = config.num_local_experts, config.num_experts_per_tok
    if not 1 <= top_k <= number:
        _refuse("num_experts_per_tok", top_k, f"a number from 1 to the {number} experts")
    normalised = bool(getattr(config, "norm_topk_prob", True))
    if normalised and top_k == 1:
        _refuse("num_experts_per_tok", 1, "at least 2 where their probabilities are normalised")
    return Experts(number, top_k, normalised)


def _rope_factors(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Return the keyword arguments of `GPTArchitecture` that scale the positions."""
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("rope_parameters.partial_rotary_factor", parameters["partial_rotary_factor"], "1.0")
    kind = parameters.get("rope_type", "default")
    if parameters.get("type", kind) != kind:
        _refuse("rope_parameters.type", parameters["type"], f"rope_type {kind!r} or no such field")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"linear_rope_factor": parameters["factor"]}
    if kind == "llama3":
        for name, expected in LLAMA3_CONSTANTS.items():
            if parameters[name] != expected:
                _refuse(f"rope_parameters.{name}", parameters[name], str(expected))
        return {"llama3_rope_factor": parameters["factor"]}
    return _refuse("rope_parameters.rope_type", kind, "one of default, linear, llama3")


def _refuse(field: str, found: object, expected: str) -> Any:
    raise UnsupportedModelError(
        f"the model's config has {field} = {found!r}, which is not supported; expected {expected}"
    )
