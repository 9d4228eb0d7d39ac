"""A checkpoint's directory, and how a new one takes its place: whole or not at all.

A save fills a hidden sibling `.NAME.saving-*` and then renames it to NAME. Where NAME exists, two renames replace
it, because no portable call swaps two directories:

    NAME               -> .NAME.previous       the only good copy for an instant
    .NAME.saving-xyz   -> NAME
    .NAME.previous     removed

Whoever looks for NAME between the two renames, or after a crash there, finds `.NAME.previous` (`open_checkpoint`).
The next save puts right what a crash left behind. Savers take turns through a lock on the parent directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dora_fx.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.files import give_default_mode, sync

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ATTEMPTS = 5
# How long a network file system may take to show on one host what another has made.
_PATIENCE_S = 5.0


def previous_of(path: Path) -> Path:
    """Return the path of the replaced checkpoint while a new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def open_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """The directory of the checkpoint that was saved as `path`, and its manifest.

    Raises:
        CheckpointError: there is none, something else is there, or the manifest is damaged.
    """
    try:
        directory = _find_checkpoint(path)
        return directory, read_manifest(directory)
    except CheckpointError:
        # A save that ends between two looks moves the checkpoint from the second place to the first.
        directory = _find_checkpoint(path)
        return directory, read_manifest(directory)


def read_unreplaced(
    path: Path,
    find: Callable[[Path], tuple[Path, Manifest]],
    read: Callable[[Path, Manifest], T],
    was_replaced: Callable[[Path, Manifest], bool],
) -> T:
    """Find and read a checkpoint, anew if a save replaced it meanwhile.

    Args:
        path: the checkpoint.
        find, was_replaced: `open_checkpoint` and `was_replaced`, or what has all ranks agree on what they say.
        read: from the directory and manifest that were found.

    Raises:
        CheckpointError: what `read` raises about a checkpoint that is still there, or every attempt met a save.
    """
    for attempt in range(_ATTEMPTS):
        directory, manifest = find(path)
        try:
            found = read(directory, manifest)
        except CheckpointError:
            if attempt == _ATTEMPTS - 1 or not was_replaced(path, manifest):
                raise
            continue
        if not was_replaced(path, manifest):
            return found
    raise CheckpointError(f"{path}: replaced {_ATTEMPTS} times while it was being read; try again")


def was_replaced(path: Path, manifest: Manifest) -> bool:
    """Return whether another save took the place of the checkpoint of this manifest."""
    try:
        return open_checkpoint(path)[1].save_id != manifest.save_id
    except CheckpointError:
        return False


def _find_checkpoint(path: Path) -> Path:
    for directory in (path, previous_of(path)):
        if (directory / MANIFEST).is_file():
            return directory
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise CheckpointError(f"{path}: found a {_kind(path)}, expected the directory of a checkpoint")
    raise CheckpointError(
        f"{path}: the directory has no {MANIFEST}, so it is no checkpoint of dora_fx or that file was lost; "
        "load another checkpoint"
    )


def check_replaceable(path: Path) -> None:
    """Raise CheckpointError unless a save may create or replace `path`: nothing, an empty directory, a checkpoint."""
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: found a symbolic link to {os.readlink(path)}, expected a checkpoint or nothing; "
            "save to the directory itself or remove the link"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: found a {_kind(path)}, expected a checkpoint or nothing; save somewhere else")
    if not (path / MANIFEST).exists() and any(path.iterdir()):
        raise CheckpointError(
            f"{path}: found a directory with files in it and no {MANIFEST}; it is no checkpoint of dora_fx, "
            "and saving would delete it. Save somewhere else or empty it"
        )


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` to write a checkpoint into; removed at the end unless it was put in place.

    While the context lasts it is locked, so that other savers do not take it for what a crash left behind.

    Raises:
        CheckpointError: `path` cannot be replaced, or its parent cannot be written.
    """
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            _remove_leftovers(path)
            directory = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
            handle = os.open(directory, os.O_RDONLY)
            _lock(handle)
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot write a checkpoint there ({error.strerror})") from error
    try:
        give_default_mode(directory)
        yield directory
    finally:
        os.close(handle)
        shutil.rmtree(directory, ignore_errors=True)


def check_visible(directory: Path) -> None:
    """Raise CheckpointError, which names this host, unless a directory that another process has just made is here.

    Its name must be one that nobody has looked for before: network file systems remember for a while what was not
    there.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not directory.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{socket.gethostname()} does not see {directory.name} in {directory.parent}, which rank 0 has just "
                "made there; expected a folder on a file system that all ranks share"
            )
        time.sleep(0.1)


def put_in_place(directory: Path, path: Path) -> None:
    """Make a filled directory the checkpoint `path`, replacing the one that is there.

    Raises:
        CheckpointError: `path` cannot be replaced.
        OSError: of the file system; the checkpoint that was there is still found.
    """
    for file in directory.iterdir():
        sync(file)
    sync(directory)
    with _locked(path.parent) as parent:
        check_replaceable(path)
        _restore_previous(path)
        if path.exists():
            os.rename(path, previous_of(path))
        os.rename(directory, path)
        os.fsync(parent)
        shutil.rmtree(previous_of(path), ignore_errors=True)


def _restore_previous(path: Path) -> None:
    """Finish what a save that died between its renames, or after them, left undone."""
    previous = previous_of(path)
    if not previous.exists():
        return
    if (path / MANIFEST).exists():
        shutil.rmtree(previous)
    else:
        if path.exists():
            path.rmdir()
        os.rename(previous, path)


def _remove_leftovers(path: Path) -> None:
    """Remove the directories of saves of `path` that died, told by their locks, which die with their owners."""
    for directory in path.parent.iterdir():
        if not directory.name.startswith(_prefix(path)):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            try:
                if _lock(handle):
                    logger.info("removing %s, which a save that died left behind", directory)
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """Wait for the lock of a directory and hold it; yields the directory's handle."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open directory; False if another process holds it.

    Raises:
        OSError: the file system has no locks. Without them savers would take each other's work for leftovers.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prefix(path: Path) -> str:
    return f".{path.name}.saving-"


def _kind(path: Path) -> str:
    return "symbolic link to nothing" if path.is_symlink() else "file"
