"""The configuration of a base model of somebody else, looked at before transformers builds what it says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dora_fx.safe_files.json_file import read_json
from dora_fx.safe_files.model_sizes import MOST_LAYERS, check_sizes
from dora_fx.safe_files.regular_file import UnsafeFileError, shortened


def check_config_sizes(path: Path, weights: Sequence[Path]) -> None:
    """Compare the sizes in a Hugging Face config.json with the files that hold the weights.

    Args:
        path: of config.json.
        weights: the files of the weights; none where a directory is asked for its configuration alone.

    Raises:
        UnsafeFileError: building the model would take memory that its weights cannot fill.
        OSError: a file cannot be read.
    """
    config = read_json(path, follow_link=True)
    if not isinstance(config, dict):
        raise UnsafeFileError(f"{path}: found a {type(config).__name__}, expected an object")
    # Four bits to an element at least.
    elements = 8 * sum(os.stat(file).st_size for file in weights) if weights else 1 << 62
    check_sizes(path, config, elements)
    # Configurations of other kinds of model, and of parts of a model, are made before they are refused.
    parts = [config]
    while parts:
        part = parts.pop()
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif "layer" in name and isinstance(value, int) and value > MOST_LAYERS:
                raise UnsafeFileError(f"{path}: found {shortened(value)} as {name}, expected at most {MOST_LAYERS:,}")
