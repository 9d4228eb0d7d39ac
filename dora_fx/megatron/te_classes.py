"""Recognise Megatron's classes over Transformer Engine by their names, since the package need not be installed."""

from __future__ import annotations

from torch import nn

TE_MODULE = "megatron.core.extensions.transformer_engine"


def derives_from(module: nn.Module, class_name: str) -> bool:
    """Return whether a module is of that class of `TE_MODULE`, or of one that derives from it."""
    return any((cls.__module__, cls.__name__) == (TE_MODULE, class_name) for cls in type(module).__mro__)
