"""Errors that end a command without a traceback."""

from __future__ import annotations

import signal


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


class Interrupted(BaseException):
    """A signal ended the command; the exit code is 128 + the signal's number.

    Like KeyboardInterrupt it is no `Exception`, so that nothing on the way up takes it for a failure.

    Attributes:
        on_every_process: whether every process of the run stops at this point too, so that they can still
            communicate.
    """

    def __init__(self, signal_number: int, *, on_every_process: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
        self.on_every_process = on_every_process
