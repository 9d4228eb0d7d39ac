"""Call functions of other rooms on every model chunk that got adapters.

A room that has such a function imports this one, so this one cannot import it. A program that attaches adapters need
not have imported the room either, and its transformers model would then be saved without the adapters. So the room is
imported by its name at the first call. This is the one dependency against the order of the rooms.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

_LISTENING_ROOM = "dora_fx.hf"

AttachListener = Callable[[nn.Module], None]
_listeners: list[AttachListener] = []


def on_attach(listener: AttachListener) -> AttachListener:
    """Have a function called with every model chunk, as it was given, after adapters were attached to it."""
    _listeners.append(listener)
    return listener


def call_attach_listeners(chunk: nn.Module) -> None:
    """Call every such function with a chunk that got adapters."""
    import_module(_LISTENING_ROOM)
    for listener in _listeners:
        listener(chunk)
