"""Have each call of a model begin with one look at all its adapted layers, see `cache/model_look.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dora_fx.cache import CachedSite, ModelLook, are_covered, is_traced
from dora_fx.function import sources_of
from dora_fx.modules.linear_wrapper import DoRALinear


def look_once_per_call(chunk: nn.Module) -> None:
    """Have calls of a chunk begin with a look at the layers that are adapted now, and at those that were before.

    Other wrappers that take a layer's place later, or put the layer itself back, are looked at as they are.

    Args:
        chunk: without wrappers.
    """
    _begin_call_of(chunk).find_places(chunk)


def set_look(chunk: nn.Module, *, rank_timeout: float, leaves_it_to_layers: bool) -> None:
    """Set how calls of a chunk begin, now and when it gets adapters.

    Args:
        chunk: without wrappers.
        rank_timeout: as `refresh` takes it, in seconds.
        leaves_it_to_layers: calls of the chunk do not look.
    """
    begun = _begin_call_of(chunk)
    begun.look, begun.leaves_it_to_layers = ModelLook(rank_timeout), leaves_it_to_layers


def _begin_call_of(chunk: nn.Module) -> _BeginCall:
    """Return the hook of a chunk, which is registered if the chunk has none."""
    for hook in chunk._forward_pre_hooks.values():
        if isinstance(hook, _BeginCall):
            return hook
    begun = _BeginCall()
    chunk.register_forward_pre_hook(begun)
    chunk.register_forward_hook(_EndCall(begun), always_call=True)
    return begun


class _BeginCall:
    """A forward pre-hook of a model.

    Attributes:
        look: of the model.
        leaves_it_to_layers: the hook does nothing.
    """

    def __init__(self) -> None:
        self.look, self.leaves_it_to_layers = ModelLook(), False
        self._places: dict[tuple[nn.Module, str], None] = {}

    def find_places(self, chunk: nn.Module) -> None:
        """Note where adapted layers are; to search a model in each of its calls would take longer than to look."""
        for holder in chunk.modules():
            names = [name for name, child in holder._modules.items() if isinstance(child, DoRALinear)]
            self._places.update(dict.fromkeys((holder, name) for name in names))

    def __call__(self, module: nn.Module, args: Any) -> None:
        # In front of a graph of the whole model there is a look of the graph's own.
        if not torch.compiler.is_compiling():
            self.look.begin([] if self.leaves_it_to_layers else self._up_to_date_scales())

    def _up_to_date_scales(self) -> list[torch.Tensor]:
        """Bring all layers up to date that take part, if their tensors can be read; return their scales."""
        layers = [holder._modules.get(name) for holder, name in self._places]
        sites = [layer for layer in layers if isinstance(layer, DoRALinear) and layer.is_adapting]
        looked_at = [site.looked_at() for site in sites]
        scales = [each.scale for each in looked_at]
        if self.look.holds_for(looked_at):
            return scales
        cached = [site.cached_site() for site in sites]
        if not _are_readable(cached):
            return []
        if not are_covered(scales):
            self.look.look(looked_at, cached)
        return scales


class _EndCall:
    """The forward hook that belongs to a `_BeginCall`."""

    def __init__(self, begun: _BeginCall) -> None:
        self._begun = begun

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._begun.look.end()


def _are_readable(sites: Iterable[CachedSite]) -> bool:
    """Return whether all layers have their parameters already; wrappers may gather or load those of each before it."""
    for site in sites:
        stored = site.stored
        tensors = (*sources_of(stored.weight), stored.lora_a, stored.lora_b, stored.magnitude)
        if any(isinstance(tensor, DTensor) or tensor.is_meta for tensor in tensors) or is_traced(*tensors):
            return False
        if not all(tensor.data_ptr() for tensor in tensors):
            return False
    return True
