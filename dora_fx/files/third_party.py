"""Error handling around third-party readers: their errors become one line that names the file and a cure.

safetensors, tokenizers, gguf, numpy, torch and transformers raise error classes of their own for a file that they
cannot read, and many of their messages do not name the file. Files without any data (a Git LFS pointer, an empty file,
a pipe, a web page) are detected before a reader opens them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dora_fx.files.json_file import read_json
from dora_fx.files.message_text import reason_of
from dora_fx.files.regular_file import UnsafeFileError, open_regular

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype html", b"<html")
_LONGEST_START = 256
_AGAIN = "download it again"


class ExplainedError(ValueError):
    """An error of this package with a complete message; `reading` lets it pass unchanged."""


class UnreadableFileError(ExplainedError):
    """A file cannot be read; the message names the file, the reason and a cure."""


@contextmanager
def reading(file: Path, cure: str) -> Iterator[None]:
    """Convert errors of libraries in the block to `UnreadableFileError`, and append a cure to every message.

    Errors of this package that have a cure pass unchanged, and so does a failed allocation, which is no fault of the
    file.

    Args:
        file: the file or folder that the block reads.
        cure: what the user can do; the end of the message.

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
    """Convert errors of libraries in the block, such as for a full disk, to OSError.

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
    """Return whether an error is a failed allocation, of Python, of torch on a CPU or of torch on CUDA."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator has no class of its own, and says "can't allocate memory" or "Cannot allocate memory".
    return isinstance(error, RuntimeError) and "t allocate memory" in str(error)


def check_readable(file: Path) -> None:
    """Check that a file is regular and holds data, before a library reads it.

    Raises:
        UnsafeFileError: it is a folder, or a pipe or device, whose reader could wait for ever.
        UnreadableFileError: it is missing, not readable, empty, a Git LFS pointer or a web page.
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
    """Check a file with `check_readable`, and parse it as a JSON object.

    Raises:
        UnsafeFileError, UnreadableFileError: from `check_readable`, or the file does not hold a JSON object.
    """
    check_readable(file)
    with reading(file, _AGAIN):
        content = read_json(file, follow_link=True)
    if not isinstance(content, dict):
        raise UnreadableFileError(f"{file}: found a {type(content).__name__}, expected an object; {_AGAIN}")
    return content


def check_no_pointer(file: Path, start: bytes) -> None:
    """Raise UnreadableFileError if a file's first bytes are those of a Git LFS pointer."""
    if start.startswith(_LFS_POINTER):
        raise UnreadableFileError(f"{file}: found a Git LFS pointer in place of the file; run: git lfs pull")


def _is_of_a_library(error: BaseException) -> bool:
    if isinstance(error, ExplainedError | UnsafeFileError):
        return False
    # A panic in Rust, which tokenizers and safetensors are written in, reaches Python as a BaseException.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
