"""The processes of a run: this process's rank, work that rank 0 does for all, and agreement on settings."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch

from dora_fx.app.errors import UserError
from dora_fx.app.runs.meeting import START, Meeting
from dora_fx.megatron import megatron_world
from dora_fx.ranks import broadcast_object, gather_objects, world_group

T = TypeVar("T")

_MOST_DIGITS = 9
_LONGEST_DOWNLOAD = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that torchrun started; by default the only process.

    All processes must call a method that communicates. With one process such a method just calls its function.
    """

    global_rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @cached_property
    def meeting(self) -> Meeting:
        """The exchange through torchrun's store, before there is a process group."""
        return Meeting(self.global_rank, self.world_size)

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read torchrun's RANK, WORLD_SIZE and LOCAL_RANK; without them this is the only process.

        Raises:
            UserError: one of them is not a number, or the rank is not below the world size.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        ranks = cls(*map(_number_in_environment, names))
        if ranks.global_rank >= ranks.world_size:
            raise UserError(
                f"RANK: found {ranks.global_rank} in the environment, expected a number below WORLD_SIZE, which is "
                f"{ranks.world_size}; {START}"
            )
        return ranks

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and shows progress."""
        return self.global_rank == 0

    @contextmanager
    def world(self, device: str, seed: int, **sizes: Any) -> Iterator[None]:
        """Start Megatron's world of these processes; raise UserError if they cannot connect.

        Args:
            device: "cpu" or "cuda".
            seed: as for `megatron_world`.
            sizes: parallel sizes, by the names that `megatron_world` has for them.
        """
        store = self.meeting.store() if self.world_size > 1 else None
        if device == "cuda":
            self.together(torch.cuda.set_device, self.local_rank)
        with megatron_world(
            device, seed=seed, store=store, global_rank=self.global_rank, world_size=self.world_size, **sizes
        ):
            yield

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on every rank, before or after the world starts; all return or all raise.

        Raises:
            UserError: it raised on another rank.
        """
        return self.meeting.together(function, *args)

    def from_main(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on rank 0 alone; every rank returns its result or raises its UserError."""
        if self.world_size == 1:
            return function(*args)
        result, problem = None, None
        if self.is_main:
            try:
                result = function(*args)
            except UserError as error:
                problem = str(error)
        result, problem = broadcast_object((result, problem), world_group())
        if problem is not None:
            raise UserError(problem)
        return cast(T, result)

    def main_first(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on rank 0, and then on the others, which find the cache that it filled.

        Raises:
            UserError: on every rank, if it raises on one.
        """
        result = self.from_main(function, *args)
        return self.together(lambda: result if self.is_main else function(*args))

    def node_first(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on one rank of each node, and then on the others, which find the cache that it filled.

        May be called before the world starts. The others wait as long as a download takes.

        Raises:
            UserError: on every rank, if it raises on one.
        """
        is_first = self.local_rank == 0
        result = self.meeting.together(lambda: function(*args) if is_first else None, timeout=_LONGEST_DOWNLOAD)
        return self.together(lambda: cast(T, result) if is_first else function(*args))

    def largest(self, value: int) -> int:
        """Return the largest of the ranks' values on every rank."""
        return max(gather_objects(value, world_group()))

    def check_agreement(self, settings: Mapping[str, object]) -> None:
        """Raise UserError on every rank if a rank's settings differ from rank 0's, naming the settings and the rank."""
        of_ranks = gather_objects({name: repr(value) for name, value in settings.items()}, world_group())
        first = of_ranks[0]
        for global_rank, own in enumerate(of_ranks):
            differing = [name for name in settings if own.get(name) != first.get(name)]
            if differing:
                listed = ", ".join(f"{name} is {own.get(name)} and {first.get(name)}" for name in differing)
                raise UserError(f"rank {global_rank} differs from rank 0: {listed}; expected the same on every rank")


def _number_in_environment(name: str) -> int:
    found = os.environ[name]
    if not (found.isascii() and found.isdigit() and len(found) <= _MOST_DIGITS):
        raise UserError(f"{name}: found {found[:80]!r} in the environment, expected a number from 0; {START}")
    return int(found)
