"""Ctrl-C and SIGTERM: end at once before training, after the step under way during it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dora_fx.app.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers the signal that asked to stop while `deferred`, and raises `Interrupted` at any other time.

    A second signal raises in any case: whoever asks twice does not want to wait.
    """

    def __init__(self, agree: Callable[[int], int] = lambda received: received) -> None:
        """`agree` turns what this process received (0 for nothing) into what any process of the run received."""
        self._agree = agree
        self._received: int | None = None
        self._deferring = False

    @property
    def requested(self) -> bool:
        return self._received is not None

    def raise_if_requested(self) -> None:
        """Raise `Interrupted` if a signal came while deferred, to any process: every one must call this."""
        received = self._agree(self._received or 0)
        if received:
            raise Interrupted(received, on_every_process=True)

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handle both signals; outside the main thread, where Python cannot, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember the first signal while the block runs; the block looks at `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and self._received is None:
            self._received = number
            # Straight to the descriptor: a handler may run in the middle of a buffered write.
            os.write(2, b"\nfinishing the step, then saving; once more to stop at once\n")
        else:
            raise Interrupted(number)
