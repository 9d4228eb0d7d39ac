"""A run folder that each node has for itself would take a part of every checkpoint: found before the first step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dora_fx.app.errors import UserError
from dora_fx.app.runs.run_ranks import Ranks
from dora_fx.checkpoint import CheckpointError, check_visible


def check_shared(ranks: Ranks, folder: Path, flag: str) -> None:
    """Have rank 0 make a directory in a folder, look for it on every rank, and remove it. Every rank calls it.

    Args:
        folder: it exists on rank 0, whose path it is.
        flag: the option that named it, for messages.

    Raises:
        UserError: on every rank, naming the folder and the host that does not see it, or rank 0 cannot write there.
    """
    if ranks.world_size == 1:
        return
    made = ranks.from_main(_make, folder, flag)
    try:
        ranks.together(_look_for, made, flag)
    finally:
        if ranks.is_main:
            shutil.rmtree(made, ignore_errors=True)


def _make(folder: Path, flag: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".seen-by-all-ranks-", dir=folder.absolute()))
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror or error}") from error


def _look_for(made: Path, flag: str) -> None:
    try:
        check_visible(made)
    except CheckpointError as error:
        raise UserError(f"{flag} {made.parent}: {error}") from error
