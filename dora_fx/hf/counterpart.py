"""The Hugging Face model that computes what a model does: the names of its layers, and the rows that each one has.

A path in it is the same at every pipeline size. Which names a Megatron model's layers are given is decided here, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_fx.hf.model_record import ModelRecord
from dora_fx.megatron import path_of_expert
from dora_fx.models import (
    DEFAULT_ARCHITECTURE,
    DEFAULT_EXPERTS_ARCHITECTURE,
    OUTPUT_LAYER,
    DecoderNames,
    HFArchitecture,
    HFParts,
    check_settings,
    known_architecture_maybe,
)
from dora_fx.modules import DoRALinear, LinearSpec, describe_linear, is_grouped_linear, looks_like_linear


@dataclass(frozen=True)
class NamedLinear:
    """A linear layer of a chunk, or that of one expert in a layer that holds several.

    Attributes:
        chunk: as it was given, bare or wrapped.
        path, whole_path: of the module, see `wrappers.NamedModule`.
        gpt_path: the path in a GPTModel with a module for each expert, whose layers Hugging Face's are; in a
            transformers model `whole_path`.
        module: a `DoRALinear`, or a linear layer that is not adapted.
        matrix: which of the module's matrices; 0 where it has one.
    """

    chunk: nn.Module
    path: str
    whole_path: str
    gpt_path: str
    module: Any
    matrix: int = 0

    @property
    def base(self) -> Any:
        """The layer itself, adapted or not."""
        return self.module.to_wrap if isinstance(self.module, DoRALinear) else self.module

    def describe(self) -> LinearSpec:
        """The description of the layer itself."""
        return describe_linear(self.whole_path, self.base).of_matrix(self.matrix)


class OwnNames:
    """The names of a transformers model, in place of `HFParts`: every layer is one there, with all of its rows."""

    def paths(self, path: str) -> tuple[str, ...]:
        """The Hugging Face layers that the layer at `path` is made of: itself."""
        return (path,)

    def rows(self, path: str, out_features: int) -> dict[str, Tensor]:
        """The rows of each of `paths`."""
        return {path: torch.arange(out_features)}


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """What the Hugging Face model is to the layers of this rank.

    Attributes:
        linears: every linear layer of this rank's chunks, in model order.
        adapted: those that DoRA adapts.
        parts: the Hugging Face layers that each of them is made of.
        paths: of the layers that the Hugging Face model has, adapted or not.
        vocabulary: rows of the output layer that stand for tokens; None where all do, for all that is known.
    """

    linears: tuple[NamedLinear, ...]
    adapted: tuple[NamedLinear, ...]
    parts: HFParts | OwnNames
    paths: tuple[str, ...]
    vocabulary: int | None


@dataclass(frozen=True, kw_only=True)
class GPTCounterpart(Counterpart):
    """The counterpart of Megatron GPT chunks.

    Attributes:
        decoder: the names in a GPTModel.
        is_assumed: nobody says what architecture the model is of, and its layers are named as those of most.
    """

    parts: HFParts
    decoder: DecoderNames
    is_assumed: bool

    @property
    def model_type(self) -> str:
        """Of the Hugging Face model's config."""
        return self.parts.hf.model_type

    def named_as(self, architecture: HFArchitecture) -> GPTCounterpart:
        """The same, with the names of another architecture, which is known to be the model's."""
        paths = architecture.linear_paths(self.decoder.num_layers, self.parts.num_experts)
        return replace(self, parts=replace(self.parts, hf=architecture), paths=paths, is_assumed=False)


def counterpart(record: ModelRecord, *, vocab_size: int | None = None, model_type: str | None = None) -> Counterpart:
    """Find the Hugging Face model of a record, on this rank alone.

    Args:
        record: of the model.
        vocab_size, model_type: as in `export_hf`; None to go by the model.

    Raises:
        ValueError: there is none, or what the caller states does not fit the model.
    """
    if not record.is_own:
        return gpt_counterpart(record, vocab_size=vocab_size, model_type=model_type)
    check_own(record, vocab_size=vocab_size, model_type=model_type)
    linears = _linears(record)
    return Counterpart(
        linears=linears,
        adapted=_adapted(linears),
        parts=OwnNames(),
        paths=tuple(named.path for _, named in record.modules),
        vocabulary=None,
    )


def check_own(record: ModelRecord, *, vocab_size: int | None = None, model_type: str | None = None) -> None:
    """Check what a caller says of a transformers model, which is its own counterpart.

    Raises:
        ValueError: it is Megatron's to be told, or there are several models.
    """
    if (found := len(record.chunks)) > 1:
        raise ValueError(f"model: found {found} chunks, expected one transformers model, which has no pipeline")
    own_type = record.model.config.model_type
    if vocab_size is not None:
        raise ValueError(f"vocab_size: found {vocab_size}, expected none for a transformers model, which pads nothing")
    if model_type not in (None, own_type):
        raise ValueError(f"model_type: found {model_type!r}, expected none or {own_type!r}, the model's own")


def gpt_counterpart(
    record: ModelRecord, *, vocab_size: int | None = None, model_type: str | None = None
) -> GPTCounterpart:
    """Do as `counterpart` for Megatron chunks.

    Raises:
        ValueError: the model computes what no known architecture does, naming the field or the model's class; or
            `vocab_size` or `model_type` is not the model's.
    """
    model = record.model
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "decoder"):
        raise ValueError(f"found a {type(model).__name__}, expected a Megatron GPTModel, whose layers have known names")
    decoder = DecoderNames.of(model)
    check_settings(config, model)
    known = known_architecture_maybe(model, model_type)
    default = DEFAULT_EXPERTS_ARCHITECTURE if getattr(config, "num_moe_experts", None) else DEFAULT_ARCHITECTURE
    architecture, linears = known or default, _linears(record, decoder)
    parts = HFParts.of(architecture, config)
    return GPTCounterpart(
        linears=linears,
        adapted=_adapted(linears),
        parts=parts,
        paths=architecture.linear_paths(decoder.num_layers, parts.num_experts),
        vocabulary=_true_vocabulary(config, linears, vocab_size),
        decoder=decoder,
        is_assumed=known is None,
    )


def _linears(record: ModelRecord, decoder: DecoderNames | None = None) -> tuple[NamedLinear, ...]:
    linears: list[NamedLinear] = []
    for chunk, (path, whole_path, module) in record.modules:
        if not looks_like_linear(module):
            continue
        named = NamedLinear(chunk, path, whole_path, decoder.gpt_path(whole_path) if decoder else whole_path, module)
        linears += _of_experts(named) if is_grouped_linear(named.base) else [named]
    return tuple(linears)


def _of_experts(grouped: NamedLinear) -> Iterator[NamedLinear]:
    experts = describe_linear(grouped.whole_path, grouped.base).experts
    assert experts is not None and experts.first is not None
    for index in range(experts.count):
        yield replace(grouped, gpt_path=path_of_expert(grouped.gpt_path, str(experts.first + index)), matrix=index)


def _adapted(linears: Sequence[NamedLinear]) -> tuple[NamedLinear, ...]:
    return tuple(linear for linear in linears if isinstance(linear.module, DoRALinear))


def _true_vocabulary(config: Any, linears: Sequence[NamedLinear], stated: int | None) -> int | None:
    """`Counterpart.vocabulary`.

    Megatron pads a vocabulary to a size that divides by the number of ranks. The rows beyond are trained like others,
    to be improbable, but no token that the model knows depends on them.

    Args:
        config: Megatron's; Megatron-Bridge's has the size before padding.
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
