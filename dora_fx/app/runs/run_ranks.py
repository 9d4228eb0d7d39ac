"""The processes of one run: who this one is, what rank 0 does for all, and whether all of them want the same."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started, or the only one.

    Every method that communicates must be called by all of them; with one process each is a plain call.
    """

    global_rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @cached_property
    def meeting(self) -> Meeting:
        """Where the processes meet."""
        return Meeting(self.global_rank, self.world_size)

    @classmethod
    def from_environment(cls) -> Ranks:
        """The process that torchrun's RANK, WORLD_SIZE and LOCAL_RANK describe, or the only one without them.

        Raises:
            UserError: one of them is no number, or there is no such rank among so many.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        found = cls(*map(_number_in_environment, names))
        if found.global_rank >= found.world_size:
            raise UserError(
                f"RANK: found {found.global_rank} in the environment, expected a number below WORLD_SIZE, which is "
                f"{found.world_size}; {START}"
            )
        return found

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and shows progress."""
        return self.global_rank == 0

    @contextmanager
    def world(
        self, device: str, seed: int, tensor_model_parallel_size: int, pipeline_model_parallel_size: int
    ) -> Iterator[None]:
        """Megatron's world of these processes, on "cpu" or "cuda"; raises UserError if they do not find each other."""
        store = self.meeting.store() if self.world_size > 1 else None
        if device == "cuda":
            self.together(torch.cuda.set_device, self.local_rank)
        with megatron_world(
            device,
            seed=seed,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            store=store,
            global_rank=self.global_rank,
            world_size=self.world_size,
        ):
            yield

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on every rank, before the world is there or in it; all return or all raise.

        Raises:
            UserError: it raised on another rank.
        """
        return self.meeting.together(function, *args)

    def from_main(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on rank 0 alone; every rank gets its result, or raises the UserError it raised."""
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
        """Call `function` on rank 0, then on the others, which find what it left in a cache.

        Raises:
            UserError: on every rank, if it raises on one.
        """
        found = self.from_main(function, *args)
        return self.together(lambda: found if self.is_main else function(*args))

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        return max(gather_objects(value, world_group()))

    def check_agreement(self, settings: Mapping[str, object]) -> None:
        """Raise UserError on every rank if the settings of one differ from rank 0's, naming them and the rank."""
        found = gather_objects({name: repr(value) for name, value in settings.items()}, world_group())
        for global_rank, theirs in enumerate(found):
            differing = [name for name in settings if theirs.get(name) != found[0].get(name)]
            if differing:
                listed = ", ".join(f"{name} is {theirs.get(name)} and {found[0].get(name)}" for name in differing)
                raise UserError(f"rank {global_rank} differs from rank 0: {listed}; expected the same on every rank")


def _number_in_environment(name: str) -> int:
    found = os.environ[name]
    if not (found.isascii() and found.isdigit() and len(found) <= _MOST_DIGITS):
        raise UserError(f"{name}: found {found[:80]!r} in the environment, expected a number from 0; {START}")
    return int(found)
