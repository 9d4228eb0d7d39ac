"""The layers of Megatron GPT chunks as Hugging Face counts them: a path that is the same at every pipeline size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_fx.layers import DoRALinear
from dora_fx.matching import looks_like_linear
from dora_fx.models.hf_parts import HF_NAMES, LM_HEAD
from dora_fx.wrappers import unwrap, walk


@dataclass(frozen=True)
class NamedLinear:
    """A linear layer of a chunk.

    Attributes:
        chunk: as it was given, bare or wrapped.
        path, whole_path: see `wrappers.NamedModule`.
        module: a `DoRALinear`, or a linear layer that is not adapted.
    """

    chunk: nn.Module
    path: str
    whole_path: str
    module: Any


def named_linears(chunks: Sequence[nn.Module]) -> list[NamedLinear]:
    """Every linear layer of the chunks in model order."""
    found = []
    for chunk in chunks:
        found += [NamedLinear(chunk, *named) for named in walk(chunk, DoRALinear) if looks_like_linear(named.module)]
    return found


def adapted_linears(chunks: Sequence[nn.Module]) -> list[NamedLinear]:
    """The layers that DoRA adapts."""
    return [linear for linear in named_linears(chunks) if isinstance(linear.module, DoRALinear)]


def gpt_config(chunks: Sequence[nn.Module]) -> Any:
    """The Megatron configuration of GPT chunks whose layers have Hugging Face counterparts.

    Raises:
        ValueError: the model computes what the Llama family does not; names the field, or the model's class.
    """
    model = unwrap(chunks[0])
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "decoder"):
        raise ValueError(f"found a {type(model).__name__}, expected a Megatron GPTModel, whose layers have known names")
    for name, expected in (("gated_linear_unit", True), ("multi_latent_attention", False), ("num_moe_experts", None)):
        found = getattr(config, name, expected)
        if found != expected:
            raise ValueError(f"the model's config has {name} = {found!r}, expected {expected!r} for the Llama family")
    return config


def every_hf_path(config: Any) -> list[str]:
    """Paths of all linear layers of the Hugging Face model."""
    layers = [
        f"model.layers.{i}.{name}" for i in range(config.num_layers) for names in HF_NAMES.values() for name in names
    ]
    return [*layers, LM_HEAD]


def whole_sizes(linear: Any) -> tuple[int, int]:
    """Input and output features of a whole base layer, without padding."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return (
        linear.input_size - getattr(linear, "padded_in_features", 0),
        linear.output_size - getattr(linear, "padded_out_features", 0),
    )
