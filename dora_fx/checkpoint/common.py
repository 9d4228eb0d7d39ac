"""`common.pt`, the file of a checkpoint for what is not sharded: the optimizer's settings, and the caller's `extra`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.files import UnsafeFileError, load_torch_bytes, read_regular

# Megatron's name for it. Versions from 0.17 on read such a file, but no longer write one.
COMMON = "common.pt"

_MOST_BYTES = 16 << 30


def read_common(directory: Path) -> dict[str, Any]:
    """Its contents, on the CPU.

    Raises:
        UnsafeFileError: it is no file of `torch.save`, or has other classes in it than plain data needs.
        CheckpointError: it holds something else than a dict.
        OSError: it cannot be read.
    """
    path = directory / COMMON
    common = load_torch_bytes(read_regular(path, at_most=_MOST_BYTES), str(path))
    if not isinstance(common, dict):
        raise CheckpointError(f"{path}: found a {type(common).__name__}, expected a dict; load another checkpoint")
    return common


def check_common(directory: Path) -> None:
    """Raise CheckpointError if a file that was just written would not be loaded again."""
    try:
        read_common(directory)
    except UnsafeFileError as error:
        raise CheckpointError(f"`extra` holds objects that would not be loaded again ({error})") from error
