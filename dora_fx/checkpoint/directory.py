"""The directory of a checkpoint, and the renames that replace it atomically.

A save fills a hidden sibling `.NAME.saving-*` and then renames it to NAME. Where NAME exists, two renames replace
it, because no portable call swaps two directories:

    NAME               -> .NAME.previous       for an instant the only complete copy under a final name
    .NAME.saving-xyz   -> NAME
    .NAME.previous     removed

A reader between the two renames, or after a crash there, opens `.NAME.previous` (`open_checkpoint`). The next save
repairs what a crash left behind. Concurrent saves are serialised by a lock on the parent directory.
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
# A network file system may take that long to show one host what another has made.
_PATIENCE_S = 5.0


def previous_of(path: Path) -> Path:
    """Return the hidden path of the old checkpoint while a new one replaces it."""
    return path.with_name(f".{path.name}.previous")


def open_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Find the directory of the checkpoint that was saved as `path`, and read its manifest.

    Raises:
        CheckpointError: there is no checkpoint, the path is something else, or the manifest is damaged.
    """
    try:
        directory = _find_checkpoint(path)
        return directory, read_manifest(directory)
    except CheckpointError:
        # Both places were tried one after the other; a save that ended in between moved the checkpoint to the first.
        directory = _find_checkpoint(path)
        return directory, read_manifest(directory)


def read_unreplaced(
    path: Path,
    find: Callable[[Path], tuple[Path, Manifest]],
    read: Callable[[Path, Manifest], T],
    was_replaced: Callable[[Path, Manifest], bool],
) -> T:
    """Find and read a checkpoint, and start again if a save replaced it meanwhile.

    Args:
        path: the checkpoint.
        find, was_replaced: `open_checkpoint` and `was_replaced`, or functions by which all ranks agree on their result.
        read: reads from the directory and manifest that `find` returned.

    Raises:
        CheckpointError: `read` raised it and the checkpoint was not replaced, or every attempt met a save.
    """
    for attempt in range(_ATTEMPTS):
        directory, manifest = find(path)
        try:
            result = read(directory, manifest)
        except CheckpointError:
            # Files that vanish in the middle of a read are no damage if a save has just removed them.
            if attempt == _ATTEMPTS - 1 or not was_replaced(path, manifest):
                raise
            continue
        # Also after a read without an error, which may have mixed files of both checkpoints.
        if not was_replaced(path, manifest):
            return result
    raise CheckpointError(f"{path}: replaced {_ATTEMPTS} times while it was being read; try again")


def was_replaced(path: Path, manifest: Manifest) -> bool:
    """Return whether another save has replaced the checkpoint of this manifest."""
    try:
        return open_checkpoint(path)[1].save_id != manifest.save_id
    except CheckpointError:
        # Nothing took its place: the read's own error is the one to report.
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
        f"{path}: the directory has no {MANIFEST}, so it is no checkpoint of dora_fx, or the file was lost; "
        "load another checkpoint"
    )


def check_replaceable(path: Path) -> None:
    """Raise CheckpointError unless `path` is free, an empty directory or a checkpoint, which a save may replace."""
    # A rename would replace the link and leave what it leads to, which is hardly what its maker expects.
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
    """Make an empty directory beside `path` for a new checkpoint; remove it at the end unless it was put in place.

    The directory stays locked within the context, so that other saves do not remove it as a leftover of a crash.

    Raises:
        CheckpointError: `path` cannot be replaced, or its parent cannot be written.
    """
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            _remove_leftovers(path)
            # Beside `path`, since a rename is atomic only within one file system.
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
    """Raise CheckpointError, naming this host, unless a directory that another process has just made is visible here.

    The name must be new: network file systems cache for a while that a name was missing.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not directory.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{socket.gethostname()} does not see {directory.name} in {directory.parent}, which rank 0 has just "
                "made; expected a folder on a file system that all ranks share"
            )
        time.sleep(0.1)


def put_in_place(directory: Path, path: Path) -> None:
    """Rename a filled directory to `path`, replacing the checkpoint that is there.

    Raises:
        CheckpointError: `path` cannot be replaced.
        OSError: from the file system; the old checkpoint can still be opened.
    """
    # Before the renames: after a power cut the new name must not lead to files whose data never reached the disk.
    for file in directory.iterdir():
        sync(file)
    sync(directory)
    with _locked(path.parent) as parent:
        # Once more under the lock, since somebody may have put something there during the save.
        check_replaceable(path)
        _restore_previous(path)
        if path.exists():
            os.rename(path, previous_of(path))
        os.rename(directory, path)
        # The renames themselves are on the disk before the old checkpoint is removed.
        os.fsync(parent)
        shutil.rmtree(previous_of(path), ignore_errors=True)


def _restore_previous(path: Path) -> None:
    """Complete the replacement of a save that died between its renames or right after them."""
    previous = previous_of(path)
    if not previous.exists():
        return
    if (path / MANIFEST).exists():
        shutil.rmtree(previous)
    else:
        # An empty directory, as `check_replaceable` allows nothing else here.
        if path.exists():
            path.rmdir()
        os.rename(previous, path)


def _remove_leftovers(path: Path) -> None:
    """Remove the directories of saves of `path` that died; they are unlocked, since a lock ends with its process."""
    for directory in path.parent.iterdir():
        if not directory.name.startswith(_prefix(path)):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            try:
                if _lock(handle):
                    logger.info("removing %s, left behind by a save that died", directory)
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """Wait for the lock of a directory and hold it; yield the directory's handle."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open directory; return False if another process holds the lock.

    Raises:
        OSError: the file system has no locks. Without them, saves would remove each other's work as leftovers.
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
