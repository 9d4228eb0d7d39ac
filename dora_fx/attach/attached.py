"""Functions that are told of modules that got adapters; a room that imports this one adds its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

# It imports this room, and a program that attaches need not have imported it.
_LISTENING_ROOM = "dora_fx.hf"

AttachListener = Callable[[nn.Module], None]
_listeners: list[AttachListener] = []


def when_attached(listener: AttachListener) -> AttachListener:
    """Have a function called with every model chunk, as it was given, after adapters were attached to it."""
    _listeners.append(listener)
    return listener


def tell_of_adapters(chunk: nn.Module) -> None:
    """Call the functions."""
    import_module(_LISTENING_ROOM)
    for listener in _listeners:
        listener(chunk)
