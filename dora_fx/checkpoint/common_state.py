"""`common.pt`, a checkpoint's file for state that is not sharded: the optimizer's settings and the caller's `extra`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.files import UnsafeFileError, load_torch_bytes, read_regular

# Megatron's name for it. Megatron-core from 0.17 on reads such a file and writes none, so it is written here.
COMMON = "common.pt"

# Far above the settings of any optimizer; `extra` may hold tensors of the caller's.
_MOST_BYTES = 16 << 30


def read_common(directory: Path) -> dict[str, Any]:
    """Read the file onto the CPU.

    Raises:
        UnsafeFileError: it was not written by `torch.save`, or holds other classes than plain data needs.
        CheckpointError: its content is not a dict.
        OSError: it cannot be read.
    """
    path = directory / COMMON
    common = load_torch_bytes(read_regular(path, at_most=_MOST_BYTES), str(path))
    if not isinstance(common, dict):
        raise CheckpointError(f"{path}: found a {type(common).__name__}, expected a dict; load another checkpoint")
    return common


def check_common(directory: Path) -> None:
    """Raise CheckpointError if the file that was just written could not be loaded again.

    `torch.save` pickles any object of `extra`, and the reader refuses most classes: better now than at the load.
    """
    try:
        read_common(directory)
    except UnsafeFileError as error:
        raise CheckpointError(f"`extra` holds objects that could not be loaded again ({error})") from error
