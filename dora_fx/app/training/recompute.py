"""Recomputation of activations in the backward pass."""

from __future__ import annotations

from typing import Any

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def recompute_layers(model: Any) -> None:
    """Have every transformer layer of a GPTModel keep its input alone for the backward pass, with the same dropout."""
    layers = model.decoder.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
