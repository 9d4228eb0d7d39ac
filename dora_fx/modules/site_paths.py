"""Paths of adapted layers by their parameters, for messages about graphs in which Dynamo recorded no modules."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_paths = WeakTensorKeyDictionary()


def note_path(lora_a: torch.Tensor, path: str) -> None:
    """Remember the path of the layer whose A, or shard of it, the parameter is."""
    _paths[lora_a] = path


def path_of(lora_a: torch.Tensor) -> str:
    """The path of the layer of that parameter; "" if it is none's."""
    return _paths.get(lora_a, "")
