"""Where the processes of a run meet: what one of them cannot do, all of them hear of, and none waits for it."""

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
# How long a process that has failed looks for the others, to tell them.
_TELLING = datetime.timedelta(seconds=60)
# How long the process that may hold the store stays, so that the others can read why the run ends.
_LEAVING = datetime.timedelta(seconds=10)


class Meeting:
    """The processes that torchrun started, through their store, which is there before any process group.

    A process that waits in a collective for one that is gone may wait for as long as the group's timeout, and what it
    then says is not why the other left. So whatever each process does by itself, reading files above all, goes through
    `together`.
    """

    def __init__(self, global_rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = global_rank, world_size
        self._store: dist.Store | None = None
        self._exchanges = 0

    def store(self, timeout: datetime.timedelta = default_pg_timeout) -> dist.Store:
        """The store of all processes; raises UserError if they do not find each other."""
        if self._store is None:
            try:
                found = dist.rendezvous("env://", self.global_rank, self.world_size, timeout=timeout)
                self._store, _, _ = next(found)
            # torch raises both for an address that is missing, malformed, taken, or where nobody answers.
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"the processes of the run do not find each other ({reason_of(error)}); {START}"
                ) from error
        return self._store

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on every process; it returns on all of them or raises on all of them.

        Raises:
            UserError: it raised on another process, whose rank and host the message has, or one is gone.
        """
        if self.world_size == 1:
            return function(*args)
        try:
            result = function(*args)
        except BaseException as error:
            # The error itself says more than that the others could not be told.
            with contextlib.suppress(UserError):
                # Whoever stops a process by a signal does not want to wait for the others.
                if isinstance(error, Exception):
                    self._exchange(_problem(error), _TELLING)
                elif self._store is not None:
                    self._exchange(_problem(error), datetime.timedelta(0))
            raise
        for rank, (problem, host) in enumerate(self._exchange(None, default_pg_timeout)):
            if problem is not None:
                raise UserError(f"{problem} (on rank {rank}, {host})")
        return result

    def _exchange(self, problem: str | None, timeout: datetime.timedelta) -> list[tuple[str | None, str]]:
        """The problem and the host of every process."""
        store, self._exchanges = self.store(timeout), self._exchanges + 1
        keys = [f"dora_fx/meeting {self._exchanges}/{rank}" for rank in range(self.world_size)]
        try:
            store.set(keys[self.global_rank], json.dumps([problem, socket.gethostname()]))
            _wait_for(store, keys, timeout)
            found = [cast(tuple[str | None, str], tuple(json.loads(store.get(key)))) for key in keys]
        except RuntimeError as error:
            raise UserError(f"another process of the run is gone ({reason_of(error)})") from error
        if any(problem is not None for problem, _ in found):
            self._leave(store, [f"{key} left" for key in keys])
        return found

    def _leave(self, store: dist.Store, keys: list[str]) -> None:
        """Let rank 0, whose store it may be, leave last."""
        with contextlib.suppress(RuntimeError):
            store.set(keys[self.global_rank], "")
            if self.global_rank == 0:
                _wait_for(store, keys, _LEAVING)


def _wait_for(store: dist.Store, keys: list[str], timeout: datetime.timedelta) -> None:
    """Do as `store.wait`, which keeps signals waiting too; raises RuntimeError when the time is over."""
    deadline, pause_s = time.monotonic() + timeout.total_seconds(), 0.001
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(f"ranks {missing} did not come within {timeout}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _problem(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError | Interrupted) else reason_of(error)
