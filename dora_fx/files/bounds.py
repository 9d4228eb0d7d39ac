"""Limits of time and memory for untrusted code in this process, such as a chat template in its sandbox."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dora_fx.files.regular_file import UnsafeFileError

_MEMORY = Path("/proc/self/statm")


@contextlib.contextmanager
def bounded(what: str, *, seconds: float, mebibytes: int) -> Iterator[None]:
    """Stop a block that takes more time, or more memory beyond what the process has already.

    Time is limited in the main thread alone, where Python delivers signals, and only between Python operations: a
    single long operation runs to its end. Memory is limited on Linux alone, and for the whole process while the block
    runs, so the block must not call code that aborts when an allocation fails.

    Raises:
        UnsafeFileError: the block was stopped; the message begins with `what`.
    """
    too_long = UnsafeFileError(f"{what} takes more than {seconds:g} seconds")
    try:
        with _limited_memory(mebibytes << 20), _limited_time(seconds, too_long):
            yield
    except MemoryError:
        raise UnsafeFileError(f"{what} takes more than {mebibytes} MiB of memory") from None


@contextlib.contextmanager
def _limited_memory(count: int) -> Iterator[None]:
    if not _MEMORY.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(_MEMORY.read_text().split()[0]) * resource.getpagesize()
    # The limit is on the whole address space, most of which libraries and the model have already taken.
    most = min(limit for limit in (used + count, *before) if limit != resource.RLIM_INFINITY)
    # The hard limit stays, or the soft one could not be raised again.
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _limited_time(seconds: float, error: UnsafeFileError) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: Any) -> None:
        raise error

    handler = signal.signal(signal.SIGALRM, give_up)
    # The timer repeats, since code that catches the first error could go on.
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
