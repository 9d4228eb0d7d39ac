"""Exchange of errors between the processes of a run, through torchrun's store: when one fails, all of them raise."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from dora_fx.app.errors import Interrupted, UserError
from dora_fx.files import reason_of

T = TypeVar("T")

START = "start the command with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK"
# Time that a process that has failed waits for the others, so that they get its error.
_TELLING = datetime.timedelta(seconds=60)
# Time that rank 0, which may host the store, stays so that the others can read the error.
_LEAVING = datetime.timedelta(seconds=10)


class Meeting:
    """Connects the processes that torchrun started through their store, which exists before any process group.

    A process that waits in a collective for one that has left waits until the group's timeout, and its error does not
    say why the other left. So everything that a process does by itself, such as reading files, runs in `together`.
    """

    def __init__(self, global_rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = global_rank, world_size
        self._store: dist.Store | None = None
        self._exchanges = 0

    def store(self, timeout: datetime.timedelta = default_pg_timeout) -> dist.Store:
        """Return the store of all processes; raise UserError if they cannot connect to it."""
        if self._store is None:
            try:
                rendezvous = dist.rendezvous("env://", self.global_rank, self.world_size, timeout=timeout)
                self._store, _, _ = next(rendezvous)
            # torch raises either of them for an address that is missing, malformed, taken, or does not answer.
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"the processes of the run do not find each other ({reason_of(error)}); {START}"
                ) from error
        return self._store

    def together(self, function: Callable[..., T], *args: Any, timeout: datetime.timedelta = default_pg_timeout) -> T:
        """Call `function` on every process; return on all of them or raise on all of them.

        `timeout` is how long a process that is done waits for the others.

        Raises:
            UserError: it raised on another process, whose rank and host the message names, or a process is gone.
        """
        if self.world_size == 1:
            return function(*args)
        try:
            result = function(*args)
        except BaseException as error:
            # The process's own error matters more than a failure to tell the others.
            with contextlib.suppress(UserError):
                # After a signal the process must end soon, so it does not wait for the others.
                if isinstance(error, Exception):
                    self._exchange(_problem(error), _TELLING)
                elif self._store is not None:
                    self._exchange(_problem(error), datetime.timedelta(0))
            raise
        for rank, (problem, host) in enumerate(self._exchange(None, timeout)):
            if problem is not None:
                raise UserError(f"{problem} (on rank {rank}, {host})")
        return result

    def from_first(self, function: Callable[..., str], *args: Any) -> str:
        """Call `function` on rank 0 alone; every process returns its text, or all raise."""
        key = f"dora_fx/meeting {self._exchanges + 1}/text"

        def on_first() -> str:
            text = function(*args) if self.global_rank == 0 else ""
            if self.global_rank == 0 and self.world_size > 1:
                self.store().set(key, text)
            return text

        text = self.together(on_first)
        return text if self.global_rank == 0 else self.store().get(key).decode()

    def _exchange(self, problem: str | None, timeout: datetime.timedelta) -> list[tuple[str | None, str]]:
        """Exchange problems; return the problem and the host of every process."""
        store, self._exchanges = self.store(timeout), self._exchanges + 1
        # New keys for each exchange, which a late process cannot confuse with the next one's.
        keys = [f"dora_fx/meeting {self._exchanges}/{rank}" for rank in range(self.world_size)]
        try:
            store.set(keys[self.global_rank], json.dumps([problem, socket.gethostname()]))
            _wait_for(store, keys, timeout)
            reports = [cast(tuple[str | None, str], tuple(json.loads(store.get(key)))) for key in keys]
        except RuntimeError as error:
            raise UserError(f"another process of the run is gone ({reason_of(error)})") from error
        if any(problem is not None for problem, _ in reports):
            self._leave(store, [f"{key} left" for key in keys])
        return reports

    def _leave(self, store: dist.Store, keys: list[str]) -> None:
        """Let rank 0, which may host the store, leave last."""
        with contextlib.suppress(RuntimeError):
            store.set(keys[self.global_rank], "")
            if self.global_rank == 0:
                _wait_for(store, keys, _LEAVING)


def _wait_for(store: dist.Store, keys: list[str], timeout: datetime.timedelta) -> None:
    """Wait for keys as `store.wait` does, but without blocking signals; raise RuntimeError after the timeout."""
    deadline, pause_s = time.monotonic() + timeout.total_seconds(), 0.001
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(f"ranks {missing} did not come within {timeout}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _problem(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError | Interrupted) else reason_of(error)
