"""The boundary in front of third-party readers: whatever they raise becomes one line that names the file and a cure.

safetensors, tokenizers, gguf, numpy, torch and transformers each raise classes of their own for a file that they
cannot read, and many of their messages do not name it. Files that are no data at all (a Git LFS pointer, an empty
file, a pipe, a web page) are found before a reader opens them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dora_fx.files.json_file import read_json
from dora_fx.files.regular_file import UnsafeFileError, open_regular, reason_of

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype html", b"<html")
_LONGEST_START = 256
_AGAIN = "download it again"


class ExplainedError(ValueError):
    """An error of this package whose message needs nothing added; `reading` lets it pass as it is."""


class UnreadableFileError(ExplainedError):
    """A file cannot be read, by whichever reader; the message names it, the reason and a cure."""


@contextmanager
def reading(file: Path, cure: str) -> Iterator[None]:
    """Turn whatever a library raises in the block into `UnreadableFileError`, and end every message with a cure.

    Errors of this package that have a cure, and a lack of memory, which is no fault of the file, pass as they are.

    Args:
        file: the file or folder that the block reads.
        cure: what the user can do, the end of the message.

    Raises:
        UnsafeFileError: the block raised it.
        UnreadableFileError: the block raised something else.
    """
    try:
        yield
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{error}; {cure}") from error
    except BaseException as error:
        if not _is_of_a_library(error) or is_out_of_memory(error):
            raise
        raise UnreadableFileError(f"{file}: cannot be read ({reason_of(error)}); {cure}") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn whatever a library raises for a disk that takes no more into OSError, as `reading` does for readers.

    Raises:
        OSError: the block raised.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) or not _is_of_a_library(error) or is_out_of_memory(error):
            raise
        raise OSError(f"{what} cannot be written ({reason_of(error)})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a failed allocation, of Python, of torch on a CPU or of torch on CUDA."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "t allocate memory" in str(error)


def check_readable(file: Path) -> None:
    """Check that a file is a regular one with data in it, before anybody reads it.

    Raises:
        UnsafeFileError: it is a folder, or a pipe or device, whose reader could wait for ever.
        UnreadableFileError: it is not there, may not be read, is empty, or is something that came in its place.
    """
    try:
        with open_regular(file, follow_link=True) as opened:
            start = opened.read(_LONGEST_START)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{error}; {_AGAIN}") from error
    except OSError as error:
        raise UnreadableFileError(f"{file}: {reason_of(error)}") from error
    if not start:
        raise UnreadableFileError(f"{file}: the file is empty; {_AGAIN}")
    check_no_pointer(file, start)
    if start.lstrip().lower().startswith(_WEB_PAGE):
        raise UnreadableFileError(f"{file}: found a web page in place of the file; {_AGAIN}")


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a JSON file that `check_readable` finds readable.

    Raises:
        UnsafeFileError, UnreadableFileError: as `check_readable`, or the file holds no JSON, or no object.
    """
    check_readable(file)
    with reading(file, _AGAIN):
        found = read_json(file, follow_link=True)
    if not isinstance(found, dict):
        raise UnreadableFileError(f"{file}: found a {type(found).__name__}, expected an object; {_AGAIN}")
    return found


def check_no_pointer(file: Path, start: bytes) -> None:
    """Raise UnreadableFileError if a file's first bytes are those of a Git LFS pointer."""
    if start.startswith(_LFS_POINTER):
        raise UnreadableFileError(f"{file}: found a Git LFS pointer in place of the file; run: git lfs pull")


def _is_of_a_library(error: BaseException) -> bool:
    if isinstance(error, ExplainedError | UnsafeFileError):
        return False
    # A panic in Rust, which tokenizers and safetensors are written in, reaches Python as a BaseException.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
