"""Paths of adapted layers by their parameters, for messages where nothing but a parameter is known."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_paths = WeakTensorKeyDictionary()


def note_path(adapter: nn.Module, path: str) -> None:
    """Remember the path of the layer that the adapter, with the parameters it has, is of."""
    for name, parameter in adapter.named_parameters():
        _paths[parameter] = (path, name)


def path_of(parameter: torch.Tensor) -> str:
    """The path of the layer that the parameter adapts; "" if it adapts none."""
    path: str = _paths.get(parameter, ("", ""))[0]
    return path


def name_of(parameter: torch.Tensor) -> str:
    """The name in the model of a parameter of an adapter; "" if it is none's."""
    path, name = _paths.get(parameter, ("", ""))
    return f"{path}.adapter.{name}" if path else ""
