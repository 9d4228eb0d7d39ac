"""Compares the tensors of a file with the names and shapes of a transformers config's model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dora_fx.files import listed
from dora_fx.models.fused_experts import are_fused, per_expert
from dora_fx.models.hf_architectures import EMBEDDING_WEIGHT, HF_ARCHITECTURES, OUTPUT_WEIGHT


def expected_shapes(config: Any, found: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name; a tied output layer is listed under its own name too.

    Args:
        config: of the model.
        found: names that a file has. Experts are expected fused if one of these is, and each by itself otherwise.
    """
    tensors = empty_model(config).state_dict()
    if not are_fused(found):
        tensors = per_expert(HF_ARCHITECTURES[config.model_type], tensors)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def empty_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Build the causal language model of a config on the meta device, which allocates nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # The config's own dtype and attention may not exist in this environment; neither changes names or shapes.
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def check_names(source: Path, config: Any, found: Collection[str], expected: Collection[str]) -> None:
    """Raise ValueError unless the tensors are exactly those of the config's model; one of two tied names is enough.

    Args:
        source: the file or folder of the tensors, for the message.
        config: of the model.
        found: names of the tensors, as the model or checkpoints on the hub name them.
        expected: those of `expected_shapes`.
    """
    tied = {EMBEDDING_WEIGHT, OUTPUT_WEIGHT}
    missing = set(expected) - set(found)
    if config.tie_word_embeddings and not tied <= missing:
        missing -= tied
    raise_for_names(f"{source}: the tensors are not those of its config", missing, set(found) - set(expected))


def raise_for_names(message: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ValueError with a message and the first of the names, if there are any."""
    if missing or unexpected:
        raise ValueError(f"{message}: missing {listed(missing)}; without a place in the model: {listed(unexpected)}")


def check_shape(source: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has the shape that its config gives it."""
    if found != expected:
        raise ValueError(f"{source}: {name} has shape {found}, expected {expected} by the model's config")
