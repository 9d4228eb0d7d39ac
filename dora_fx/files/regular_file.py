"""Opens regular files alone: reading a named pipe can block, a device has no end, and a link leads elsewhere."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from dora_fx.files.message_text import shortened

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)


class UnsafeFileError(ValueError):
    """A file violates its format; reading on could run code, exhaust the memory or never end."""


def named_beside(file: Path, name: object) -> Path:
    """Return the path of a file that `file` names, which must lie in the same folder.

    Raises:
        UnsafeFileError: the name leads out of the folder or into a sub-folder, or is not a file name.
    """
    is_plain = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
    if not isinstance(name, str) or not is_plain:
        raise UnsafeFileError(f"{file}: found {shortened(name)} as the name of a file, expected one of this folder")
    return file.parent / name


def open_regular(path: Path, *, follow_link: bool = False) -> BufferedReader:
    """Open a regular file for reading. The open file itself is checked, so nothing can be put in its place later.

    Args:
        path: of the file.
        follow_link: open the target of a symbolic link; the caches of models consist of links.

    Raises:
        UnsafeFileError: it is not a regular file.
        OSError: it is missing or cannot be read.
    """
    # O_NONBLOCK, since opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if not follow_link and path.is_symlink():
        raise UnsafeFileError(
            f"{path}: found a symbolic link, expected a regular file; copy the folder with `cp -rL` if you know it"
        )
    # O_NOFOLLOW also refuses a link that took the file's place after the check above.
    handle = os.open(path, flags if follow_link else flags | os.O_NOFOLLOW)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise _not_regular(path, mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, *, at_most: int, follow_link: bool = False) -> bytes:
    """Read a regular file; raise UnsafeFileError for more than `at_most` bytes, and the errors of `open_regular`."""
    with open_regular(path, follow_link=follow_link) as file:
        size = size_of(file)
        if size > at_most:
            raise UnsafeFileError(f"{path}: found {size:,} bytes, expected at most {at_most:,} of a file of this kind")
        return file.read()


def check_no_special_files(folder: Path) -> None:
    """Check that a folder holds files, folders and links to them alone, for readers that open whatever they find.

    Names that start with a dot, which belong to tools, and broken links are ignored.

    Raises:
        UnsafeFileError: it has a named pipe, a socket or a device.
        OSError: it cannot be read.
    """
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(".") and entry.exists():
            mode = entry.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _not_regular(entry, mode)


def size_of(file: BufferedReader) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def _not_regular(path: Path, mode: int) -> UnsafeFileError:
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "file of another kind")
    return UnsafeFileError(f"{path}: found a {kind}, expected a regular file")
