"""Steps for a file or folder that was filled under a temporary name and is about to be renamed to its final name."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's data, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_default_mode(path: Path) -> None:
    """Set the permissions that the umask allows; `tempfile` lets only the owner read what it makes."""
    # The umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
