"""The layers of Megatron GPT chunks as Hugging Face counts them: a path that is the same at every pipeline size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_fx.megatron import unwrap, walk
from dora_fx.models import (
    DEFAULT_ARCHITECTURE,
    HF_ARCHITECTURES,
    LAYERS,
    LM_HEAD,
    OUTPUT_LAYER,
    SUPPORTED_MODEL_TYPES,
    DecoderNames,
    HFArchitecture,
    check_settings,
    check_states,
    noted_architecture_maybe,
)
from dora_fx.modules import DoRALinear, LinearSpec, describe_linear, looks_like_linear


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

    @property
    def gpt_path(self) -> str:
        """The path in a GPTModel, whose layers Hugging Face's are; raises ValueError where there is none."""
        return DecoderNames.of(self.chunk).gpt_path(self.whole_path)

    @property
    def base(self) -> Any:
        """The layer itself, adapted or not."""
        return self.module.to_wrap if isinstance(self.module, DoRALinear) else self.module

    def describe(self) -> LinearSpec:
        """The description of the layer itself."""
        return describe_linear(self.whole_path, self.base)


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
        ValueError: the model computes what no known architecture does; names the field, or the model's class.
    """
    model = unwrap(chunks[0])
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "decoder"):
        raise ValueError(f"found a {type(model).__name__}, expected a Megatron GPTModel, whose layers have known names")
    DecoderNames.of(model)
    check_settings(config, model)
    return config


def named_architecture(chunks: Sequence[nn.Module], stated: str | None) -> HFArchitecture:
    """The architecture whose names a model's layers are given.

    Args:
        chunks: of the model.
        stated: a `model_type` by the caller, None to go by the model.

    Raises:
        ValueError: the statement is no known type, names layers otherwise than the checkpoint that the model is of, or
            is of an architecture with other norms or biases.
    """
    if stated is not None and stated not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"model_type: found {stated!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    model: Any = unwrap(chunks[0])
    noted = noted_architecture_maybe(model)
    if stated is None:
        return noted or DEFAULT_ARCHITECTURE
    hf = HF_ARCHITECTURES[stated]
    if noted is not None and noted.linears != hf.linears:
        raise ValueError(f"model_type: found {stated!r}, expected {noted.model_type!r}, which the model was built from")
    check_states(model.config, model_type=stated, qkv_bias=hf.qkv_bias, qk_layernorm=hf.qk_layernorm)
    return hf


def true_vocabulary(config: Any, linears: Sequence[NamedLinear], stated: int | None) -> int | None:
    """Rows of the output layer that stand for tokens; None where all do, for all that is known.

    Megatron pads a vocabulary to a size that divides by the number of ranks. The rows beyond are trained like others,
    to be improbable, but no token that the model knows depends on them.

    Args:
        config: from `gpt_config`; Megatron-Bridge's has the size before padding.
        linears: of this rank's chunks.
        stated: by the caller, None to go by the model.

    Raises:
        ValueError: the statement is no number of rows of the output layer.
    """
    sizes = [linear.describe().true_sizes[1] for linear in linears if linear.whole_path == OUTPUT_LAYER]
    if stated is not None and (stated <= 0 or any(stated > size for size in sizes)):
        raise ValueError(
            f"vocab_size: found {stated}, expected a positive number, at most the {sizes[0] if sizes else 'number of'} "
            "rows of the model's output layer"
        )
    known = getattr(config, "vocab_size", None) if stated is None else stated
    return known if known is not None and all(known < size for size in sizes) else None


def num_hf_layers(chunks: Sequence[nn.Module]) -> int:
    """The number of layers of the Hugging Face model; raises ValueError as `gpt_config`."""
    gpt_config(chunks)
    return DecoderNames.of(chunks[0]).num_layers


def every_hf_path(hf: HFArchitecture, num_layers: int) -> list[str]:
    """Paths of all linear layers of the Hugging Face model."""
    names = [name for parts in hf.linears.values() for name in parts]
    return [*(f"{LAYERS}.{i}.{name}" for i in range(num_layers) for name in names), LM_HEAD]
