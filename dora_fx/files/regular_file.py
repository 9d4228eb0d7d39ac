"""Regular files alone are opened: a named pipe would be waited for, a device has no end, a link leads elsewhere."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)

_MOST_SHOWN, _LONGEST_REASON = 80, 300


class UnsafeFileError(ValueError):
    """A file is not what its format allows, so that reading on could run code, take all memory or never end."""


def named_beside(file: Path, name: object) -> Path:
    """The path of a file that `file` names, which must lie beside it.

    Raises:
        UnsafeFileError: the name leads out of the folder, into a folder of it, or is no name of a file.
    """
    is_plain = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
    if not isinstance(name, str) or not is_plain:
        raise UnsafeFileError(f"{file}: found {shortened(name)} as the name of a file, expected one of this folder")
    return file.parent / name


def open_regular(path: Path, *, follow_link: bool = False) -> BufferedReader:
    """Open a regular file to read; nothing can take its place between the check and the reading.

    Args:
        path: of the file.
        follow_link: open what a symbolic link leads to; caches of models are made of links.

    Raises:
        UnsafeFileError: it is something else than a regular file.
        OSError: it is not there or cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if not follow_link and path.is_symlink():
        raise UnsafeFileError(
            f"{path}: found a symbolic link, expected a regular file; copy the folder with `cp -rL` if you know it"
        )
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
    """All bytes of a regular file; raises UnsafeFileError for more than `at_most`, besides what `open_regular` does."""
    with open_regular(path, follow_link=follow_link) as file:
        size = size_of(file)
        if size > at_most:
            raise UnsafeFileError(f"{path}: found {size:,} bytes, expected at most {at_most:,} of a file of this kind")
        return file.read()


def check_no_special_files(folder: Path) -> None:
    """Check that a folder has files and folders alone, or links to them, for readers that open what they find.

    Names that start with a dot, which are of tools, and links to nothing are let be.

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
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def shortened(value: object) -> str:
    """A value of a file as an error shows it, whatever its size; values in values could have any."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]!r}..."
    is_short = value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if is_short else f"a value of type {type(value).__name__}"


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error, cut to a length that a terminal shows; of the system's errors their text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    kind = type(error).__name__
    return f"{kind}: {line[:_LONGEST_REASON]}" if line else kind


def _not_regular(path: Path, mode: int) -> UnsafeFileError:
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "file of another kind")
    return UnsafeFileError(f"{path}: found a {kind}, expected a regular file")
