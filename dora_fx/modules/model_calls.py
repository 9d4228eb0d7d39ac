"""Have each call of a model begin with one check of all its adapted layers, see `cache/call_check.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dora_fx.cache import CallCheck, SiteTensors, is_traced
from dora_fx.modules.linear_wrapper import DoRALinear


def check_once_per_call(chunk: nn.Module) -> None:
    """Have calls of a chunk begin with a check of the layers that are adapted now, and of those that were before.

    Other wrappers that take a layer's place later, or put the layer itself back, are checked as they are.

    Args:
        chunk: without wrappers.
    """
    _begin_call_of(chunk).find_places(chunk)


def set_call_check(chunk: nn.Module, *, rank_timeout: float, leaves_it_to_layers: bool) -> None:
    """Set how calls of a chunk begin, now and when it gets adapters.

    Args:
        chunk: without wrappers.
        rank_timeout: as `refresh` takes it, in seconds.
        leaves_it_to_layers: calls of the chunk do not check.
    """
    begun = _begin_call_of(chunk)
    begun.check, begun.leaves_it_to_layers = CallCheck(rank_timeout), leaves_it_to_layers


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
        check: of the model.
        leaves_it_to_layers: the hook does nothing.
    """

    def __init__(self) -> None:
        self.check, self.leaves_it_to_layers = CallCheck(), False
        self._places: dict[tuple[nn.Module, str], None] = {}

    def find_places(self, chunk: nn.Module) -> None:
        """Note where adapted layers are; to search a model in each of its calls would take longer than the check."""
        for holder in chunk.modules():
            names = [name for name, child in holder._modules.items() if isinstance(child, DoRALinear)]
            self._places.update(dict.fromkeys((holder, name) for name in names))

    def __call__(self, module: nn.Module, args: Any) -> None:
        # In front of a graph of the whole model there is a check of the graph's own.
        if not torch.compiler.is_compiling():
            self.check.begin([] if self.leaves_it_to_layers else self._up_to_date_scales())

    def _up_to_date_scales(self) -> list[torch.Tensor]:
        """Bring all layers up to date that take part, if their tensors can be read; return their scales."""
        layers = [holder._modules.get(name) for holder, name in self._places]
        called = [layer for layer in layers if isinstance(layer, DoRALinear) and layer.is_adapting]
        sites = [site for layer in called for site in layer.sites_of_call()]
        site_tensors = [site.site_tensors() for site in sites]
        if is_traced(*(tensor for each in site_tensors for tensor in (each.scale, *each.sources))):
            return []
        if not self.check.holds_for(site_tensors):
            for layer in called:
                layer.check_mixture()
            if not all(map(_is_readable, site_tensors)):
                return []
            self.check.refresh(site_tensors, [site.cached_site() for site in sites])
        return [each.scale for each in site_tensors]


class _EndCall:
    """The forward hook that belongs to a `_BeginCall`."""

    def __init__(self, begun: _BeginCall) -> None:
        self._begun = begun

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._begun.check.end()


def _is_readable(site: SiteTensors) -> bool:
    """Return whether a layer has its parameters already; wrappers may gather or load those of each before it."""
    tensors = (*site.sources, *site.weights)
    return not any(isinstance(tensor, DTensor) or tensor.is_meta or not tensor.data_ptr() for tensor in tensors)
