"""What a merged layer keeps for `unmerge`, and how merged layers are told from others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dora_fx.megatron import NamedModule, walk
from dora_fx.modules import DoRALinear

_KEPT = "_dora_fx_kept"
# An attribute of a dense layer in the place of a quantised one.
_WAS_QUANTISED = "_dora_fx_was_quantised"


@dataclass(frozen=True)
class KeptAdapter:
    """The data that `unmerge` needs, an attribute of the merged layer. No module, so the model does not contain it.

    Attributes:
        site: the adapted layer that the merged one stands in for.
        weights: copies of W0, or of this rank's shards, in host memory, of the layer or of each of its experts; None
            where the merged layer is another one than the base, which has its weight still.
        merged_again: another adapter was merged into the layer since, which unmerging would lose.
    """

    site: DoRALinear
    weights: tuple[torch.Tensor, ...] | None
    merged_again: bool = False


def kept_adapter_maybe(module: nn.Module) -> KeptAdapter | None:
    """Return what a merged layer keeps; None for any other layer."""
    return getattr(module, _KEPT, None)


def keep(module: nn.Module, kept: KeptAdapter | None) -> None:
    """Have a merged layer keep this, in place of what it has kept, or nothing any more."""
    if kept is not None:
        setattr(module, _KEPT, kept)
    else:
        delattr(module, _KEPT)


def merged_layer_maybe(module: nn.Module) -> DoRALinear | None:
    """Return the adapted layer that a merged one stands in for, if it can be taken out again."""
    kept = kept_adapter_maybe(module)
    return None if kept is None else kept.site


def is_merged(module: nn.Module) -> bool:
    """Return whether a layer has an adapter merged into it that `unmerge` would take out."""
    return kept_adapter_maybe(module) is not None


def merged_layers(chunks: Iterable[nn.Module]) -> list[tuple[NamedModule, KeptAdapter]]:
    """Return the merged layers of a model's chunks, with what each keeps."""
    found = ((named, kept_adapter_maybe(named.module)) for chunk in chunks for named in walk(chunk))
    return [(named, kept) for named, kept in found if kept is not None]


def mark_was_quantised(layer: nn.Module) -> None:
    """Note that a dense layer stands in the place of a quantised one."""
    setattr(layer, _WAS_QUANTISED, True)


def was_quantised(module: nn.Module) -> bool:
    """Return whether a plain layer stands in the place of a quantised one that was merged."""
    return hasattr(module, _WAS_QUANTISED)
