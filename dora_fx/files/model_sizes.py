"""Compares the sizes in a model's configuration with its weights, before layers of those sizes are built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_fx.files.message_text import shortened
from dora_fx.files.regular_file import UnsafeFileError

# Configurations make lists as long as these numbers; the deepest models have some hundred layers.
_COUNTS, _LARGEST_COUNT = ("num_hidden_layers", "num_labels"), 10_000
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")


def check_sizes(path: Path, sizes: Mapping[str, Any], elements: int) -> None:
    """Raise UnsafeFileError if sizes need more weights than there are, or make longer lists than any model has.

    Args:
        path: file that the sizes come from.
        sizes: by their names in a Hugging Face configuration; other fields are ignored.
        elements: number of elements of all weights together.
    """
    for name in ("num_hidden_layers", *_WIDTHS):
        size = sizes.get(name)
        if size is not None and (not isinstance(size, int) or not 0 < size <= elements):
            raise UnsafeFileError(
                f"{path}: found {shortened(size)} as {name}, expected an integer from 1 to the elements of its weights"
            )
    for name in _COUNTS:
        count = sizes.get(name)
        if count is not None and (not isinstance(count, int) or count > _LARGEST_COUNT):
            raise UnsafeFileError(f"{path}: found {shortened(count)} as {name}, expected at most {_LARGEST_COUNT:,}")
    layers, hidden = sizes.get("num_hidden_layers") or 1, sizes.get("hidden_size") or 1
    for width in (layers, *(sizes.get(name) or 1 for name in _WIDTHS)):
        if width * hidden > elements:
            raise UnsafeFileError(
                f"{path}: found sizes that need {width * hidden:,} elements, expected at most the {elements:,} of "
                "its weights"
            )


def check_elements(path: Path | str, elements: int, size: int) -> None:
    """Raise UnsafeFileError if a file of `size` bytes describes tensors of more elements than it can hold."""
    # No dtype takes less than one bit per element.
    if elements > 8 * size:
        raise UnsafeFileError(f"{path}: found {elements:,} elements of tensors, expected at most {8 * size:,}")
