"""Checks before the first step that all nodes share the run folder; each would save a part of every checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dora_fx.app.errors import UserError
from dora_fx.app.runs.run_ranks import Ranks
from dora_fx.checkpoint import CheckpointError, check_visible


def check_shared(ranks: Ranks, folder: Path, flag: str) -> None:
    """Make a directory on rank 0, check that every rank sees it, and remove it. Every rank calls it.

    Args:
        ranks: of the run.
        folder: the run folder, which exists on rank 0.
        flag: the option that named it, for messages.

    Raises:
        UserError: on every rank: a host, which the message names, does not see the folder, or rank 0 cannot write.
    """
    if ranks.world_size == 1:
        return
    marker = ranks.from_main(_make_marker, folder, flag)
    try:
        ranks.together(_check_marker, marker, flag)
    finally:
        if ranks.is_main:
            shutil.rmtree(marker, ignore_errors=True)


def _make_marker(folder: Path, flag: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".seen-by-all-ranks-", dir=folder.absolute()))
    except OSError as error:
        raise UserError(f"{flag} {folder}: {error.strerror or error}") from error


def _check_marker(marker: Path, flag: str) -> None:
    try:
        check_visible(marker)
    except CheckpointError as error:
        raise UserError(f"{flag} {marker.parent}: {error}") from error
