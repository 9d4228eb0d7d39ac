"""Errors that end a command without a traceback."""

from __future__ import annotations

import signal


class UserError(Exception):
    """An error that the user can correct; the command shows it as one line and exits with code 2."""


class Interrupted(BaseException):
    """A signal stopped the command; the exit code is 128 plus the signal's number.

    It is a BaseException as KeyboardInterrupt is, so that handlers of `Exception` do not treat it as a failure.

    Attributes:
        on_every_process: whether every process of the run stops at this point, so that they can still communicate.
    """

    def __init__(self, signal_number: int, *, on_every_process: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
        self.on_every_process = on_every_process
