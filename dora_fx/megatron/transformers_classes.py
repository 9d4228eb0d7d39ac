"""Recognise classes of transformers, without importing a library that a program has no use for."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_transformers_model(module: nn.Module) -> bool:
    """Return whether a module, which is no wrapper, is a transformers model."""
    return _is_of(module, "transformers.modeling_utils", "PreTrainedModel")


def is_transformers_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer that transformers can recompute: nearly every decoder and encoder layer."""
    return _is_of(module, "transformers.modeling_layers", "GradientCheckpointingLayer")


def is_transformers_cache(value: Any) -> bool:
    """Return whether a value is a cache of keys and values, or of states, of transformers."""
    return _is_of(value, "transformers.cache_utils", "Cache")


def _is_of(value: Any, module_name: str, class_name: str) -> bool:
    """Return whether a value is of a class; a module that nobody has imported has no instances of its classes."""
    library = sys.modules.get(module_name)
    return library is not None and isinstance(value, getattr(library, class_name))
