"""How the compiled parts of a transformers model are called, so that all its layers share a graph.

    call                                            layers
    without a cache of keys and values              compiled; the first adapted layer's input needs a gradient, as the
                                                    inputs of all others do
    with a cache (`generate`)                       not compiled: a layer reads the cache by its own number, so a graph
                                                    would serve one layer alone
    collecting hidden states or attentions          not compiled: transformers collects in hooks that a graph passes by

transformers makes a cache unless it is told not to. A call that trains or has labels has no use for one, and gets
`use_cache=False` if it does not say.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from typing import Any

import torch
from torch import nn

from dora_fx.megatron import (
    Arguments,
    is_transformers_cache,
    is_transformers_model,
    walk,
    with_gradient,
    without_gradient,
)

logger = logging.getLogger(__name__)

# Names of a call's cache in transformers 5.
_CACHES = ("cache", "past_key_values")

_told_of_caches: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class LayerCall:
    """Stands in for what `nn.Module.compile` made of one layer; copies and pickles of the layer leave both out."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.compiled = layer, layer._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_collecting() or any(map(is_transformers_cache, (*args, *kwargs.values()))):
            return self.layer._call_impl(*args, **kwargs)
        if not torch.is_grad_enabled():
            # transformers makes the first layer's input need one even there, once a model is recomputed.
            args, kwargs = without_gradient(args, kwargs) or (args, kwargs)
        elif any(parameter.requires_grad for parameter in self.layer.parameters()):
            # A layer in front of all that is trained stays as cheap as it is.
            args, kwargs = with_gradient(args, kwargs) or (args, kwargs)
        return self.compiled(*args, **kwargs)


class ModelCall:
    """Stands in for what `nn.Module.compile` made of a whole model."""

    def __init__(self, model: Any) -> None:
        self.model, self.compiled = model, model._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = without_unasked_cache(self.model, args, kwargs) or (args, kwargs)
        call = self.model._call_impl if _has_cache(self.model, args, kwargs) else self.compiled
        return call(*args, **kwargs)


def compile_layer(layer: Any, settings: dict[str, Any]) -> None:
    """Compile a layer of transformers, or torch's activation checkpointing around one, in place.

    Args:
        settings: of `torch.compile`.
    """
    layer.compile(**settings)
    layer._compiled_call_impl = LayerCall(layer)


def compile_whole(model: Any, settings: dict[str, Any]) -> None:
    """Compile a transformers model as a whole, in place; calls with a cache are not compiled."""
    model.compile(**settings)
    model._compiled_call_impl = ModelCall(model)


def leave_out_caches(chunk: nn.Module) -> None:
    """Let the transformers models in a chunk make no cache in calls that have no use for it; see the file's head."""
    within: set[nn.Module] = set()
    for named in walk(chunk):
        model = named.module
        if model in within or not is_transformers_model(model) or "use_cache" not in _parameters(type(model).forward):
            continue
        # It tells the models inside.
        within.update(model.modules())
        # A copy of a compiled model has the hook already.
        if without_unasked_cache not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(without_unasked_cache, with_kwargs=True)


def without_unasked_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Forward pre-hook of a transformers model: `use_cache=False` for a call that trains or has labels and is silent.

    What a caller asks for is never changed. A cache in a training call is a warning, since its layers run uncompiled.
    """
    names, given = _parameters(type(model).forward), _given(model, args, kwargs)
    trains = model.training and torch.is_grad_enabled()
    if given.get("use_cache") is not None or any(given.get(name) is not None for name in _CACHES):
        if trains and given.get("use_cache") is not False and model not in _told_of_caches:
            _told_of_caches.add(model)
            logger.warning(
                "%s: found a cache in a call that trains, so its layers run uncompiled; expected use_cache=False",
                type(model).__name__,
            )
        return None
    if "use_cache" not in names or (not trains and given.get("labels") is None):
        return None
    index = names.index("use_cache")
    if index < len(args):
        return (*args[:index], False, *args[index + 1 :]), kwargs
    return args, {**kwargs, "use_cache": False}


def _given(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters(type(model).forward), args, strict=False)), **kwargs}


def _has_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a model's call is given a cache or makes one."""
    given = _given(model, args, kwargs)
    if any(given.get(name) is not None for name in _CACHES):
        return True
    if "use_cache" not in _parameters(type(model).forward):
        # The configs of encoders have the setting too.
        return False
    use_cache = given.get("use_cache")
    return bool(getattr(model.config.get_text_config(), "use_cache", False) if use_cache is None else use_cache)


@functools.cache
def _parameters(forward: Any) -> tuple[str, ...]:
    """Return the names of the parameters of a model's `forward`, without the model itself."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _is_collecting() -> bool:
    """Return whether a call in progress was asked for hidden states, attentions or the like (transformers 5.24)."""
    library = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(library, "_active_collector", None)
    return collector is not None and bool(collector.get())
