"""Paths of adapted layers by their parameters, for messages where nothing but a parameter is known."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_paths = WeakTensorKeyDictionary()


def note_path(adapter: nn.Module, path: str) -> None:
    """Note the path of an adapted layer for the parameters that its adapter has at present."""
    for name, parameter in adapter.named_parameters():
        _paths[parameter] = (path, name)


def note_alias(alias: torch.Tensor, parameter: torch.Tensor) -> None:
    """Note the path of a tensor that stands in for a parameter."""
    _paths[alias] = _paths.get(parameter, ("", ""))


def path_of(parameter: torch.Tensor) -> str:
    """Return the path of the layer that the parameter adapts; "" if it adapts none."""
    path: str = _paths.get(parameter, ("", ""))[0]
    return path


def name_of(parameter: torch.Tensor) -> str:
    """Return an adapter parameter's name in the model; "" for a parameter of no adapter."""
    path, name = _paths.get(parameter, ("", ""))
    return f"{path}.adapter.{name}" if path else ""
