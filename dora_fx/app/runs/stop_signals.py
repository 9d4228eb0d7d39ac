"""Handles Ctrl-C and SIGTERM: before training they stop the command at once, during it after the current step."""

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
    """Raises `Interrupted` on a signal; within `deferred`, only remembers the first signal.

    A second signal always raises, so that the user can stop without waiting.
    """

    def __init__(self, agree: Callable[[int], int] = lambda received: received) -> None:
        """Take `agree`, which maps this process's signal (0 for none) to the signal that any process received."""
        self._agree = agree
        self._received: int | None = None
        self._deferring = False

    @property
    def requested(self) -> bool:
        return self._received is not None

    def raise_if_requested(self) -> None:
        """Raise `Interrupted` if any process received a signal while deferred; every process must call it."""
        received = self._agree(self._received or 0)
        if received:
            raise Interrupted(received, on_every_process=True)

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handle both signals within the block; do nothing outside the main thread, where Python cannot."""
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
        """Within the block, only remember the first signal; the block checks `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and self._received is None:
            self._received = number
            # Directly to the descriptor, since the handler may interrupt a buffered write.
            os.write(2, b"\nfinishing the step, then saving; once more to stop at once\n")
        else:
            raise Interrupted(number)
