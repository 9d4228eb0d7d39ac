"""Activation checkpointing of whole layers."""

from __future__ import annotations

from typing import Any

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def recompute_layers(model: Any) -> None:
    """Wrap every transformer layer of a GPTModel so that only its input is kept for the backward pass.

    The recomputation draws the same dropout masks.
    """
    layers = model.decoder.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
