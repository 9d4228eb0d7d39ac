"""Names and shapes of the tensors that a transformers config's model has, for files to be compared with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dora_fx.models.hf_architectures import EMBEDDING_WEIGHT, OUTPUT_WEIGHT

_MOST_LISTED = 5


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name; an output layer that is tied to the embedding has its name too."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def empty_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a config, on the meta device, where nothing is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # The config's own dtype and attention need not exist here, and neither changes names or shapes.
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def check_names(source: Path, config: Any, found: Collection[str]) -> None:
    """Raise ValueError unless there are all tensors of the config's model and no others; of tied ones, one is enough.

    Args:
        source: the file or folder that they are in, for the message.
        config: of the model.
        found: names as the model has them.
    """
    expected, tied = set(expected_shapes(config)), {EMBEDDING_WEIGHT, OUTPUT_WEIGHT}
    missing = expected - set(found)
    if config.tie_word_embeddings and not tied <= missing:
        missing -= tied
    raise_for_names(f"{source}: the tensors are not those of its config", missing, set(found) - expected)


def raise_for_names(message: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ValueError with a message and the names, the first of them, unless there are none."""
    if missing or unexpected:
        raise ValueError(f"{message}: missing {listed(missing)}; without a place in the model: {listed(unexpected)}")


def check_shape(source: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has the shape that its config gives it."""
    if found != expected:
        raise ValueError(f"{source}: {name} has shape {found}, expected {expected} by the model's config")


def listed(names: Collection[str]) -> str:
    """The first names of many, for a message."""
    more = len(names) - _MOST_LISTED
    return (", ".join(sorted(names)[:_MOST_LISTED]) or "none") + (f" and {more} more" if more > 0 else "")
