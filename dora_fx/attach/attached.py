"""Functions that are told of modules that got adapters; rooms below this one add theirs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

# Its functions are told, whether or not a program has imported it.
_ROOM_BELOW = "dora_fx.hf"

AttachListener = Callable[[nn.Module], None]
_listeners: list[AttachListener] = []


def when_attached(listener: AttachListener) -> AttachListener:
    """Have a function called with every model chunk, as it was given, after adapters were attached to it."""
    _listeners.append(listener)
    return listener


def tell_of_adapters(chunk: nn.Module) -> None:
    """Call the functions."""
    import_module(_ROOM_BELOW)
    for listener in _listeners:
        listener(chunk)
