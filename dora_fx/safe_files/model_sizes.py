"""Sizes of a model that its weights cannot have, before anybody builds layers and tables of those sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_fx.safe_files.regular_file import UnsafeFileError, shortened

# Configurations make lists as long as their number of layers; the deepest models have some hundred.
MOST_LAYERS = 10_000
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")


def check_sizes(path: Path, sizes: Mapping[str, Any], elements: int) -> None:
    """Raise UnsafeFileError for sizes, by their names in a Hugging Face configuration, that need more weights.

    Args:
        path: where they are from.
        sizes: any of num_hidden_layers, hidden_size, intermediate_size and vocab_size.
        elements: the most that all weights together can have.
    """
    for name in ("num_hidden_layers", *_WIDTHS):
        size = sizes.get(name)
        if size is not None and (not isinstance(size, int) or not 0 < size <= elements):
            raise UnsafeFileError(f"{path}: found {shortened(size)} as {name}, expected what its weights have room for")
    layers, hidden = sizes.get("num_hidden_layers") or 1, sizes.get("hidden_size") or 1
    if layers > MOST_LAYERS:
        raise UnsafeFileError(f"{path}: found {layers:,} layers, expected at most {MOST_LAYERS:,}")
    for width in (layers, *(sizes.get(name) or 1 for name in _WIDTHS)):
        if width * hidden > elements:
            raise UnsafeFileError(
                f"{path}: found sizes that need {width * hidden:,} elements, expected at most the {elements:,} that "
                "its weights have room for"
            )
