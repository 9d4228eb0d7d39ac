"""Writes a folder atomically: it is either complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_fx.files.durable import give_default_mode, sync


def check_new_folder(path: Path) -> None:
    """Raise FileExistsError unless `path` is free or an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path}: it exists, expected a name that is free or an empty folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` at the end, or remove it if the block raises.

    Raises:
        FileExistsError: `path` is taken.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic only within one file system.
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in (file for file in temporary.rglob("*") if file.is_file()):
            give_default_mode(file)
            sync(file)
        give_default_mode(temporary)
        # It replaces an empty folder, and raises if the folder has got a file meanwhile.
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
