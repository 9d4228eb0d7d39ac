"""Steps that all ranks take together: a step succeeds on every rank or fails on every rank.

A rank that raises alone leaves the others in the next collective until the process group's timeout, with an error that
says nothing of the cause. Exchanging the errors at the end of each step costs one small collective and avoids both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from dora_fx.files import UnsafeFileError
from dora_fx.ranks.exchange import broadcast_object, gather_objects
from dora_fx.ranks.groups import world_group


@dataclass(frozen=True)
class CollectiveSteps:
    """Makes the ranks of the default group raise together when one of them fails.

    Attributes:
        error: the class that is raised. If the step itself raises this class, its message stays unchanged.
    """

    error: type[RuntimeError]

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Run the block on every rank; if it raises on one rank, every rank raises `error`.

        Args:
            what: name of the step for messages, such as "writing the tensors".
        """
        error: RuntimeError | None = None
        try:
            yield
        except self.error as raised:
            error = raised
        # torch's CheckpointException is a BaseException, which `except Exception` lets through.
        except (Exception, CheckpointException) as raised:
            error = self.error(f"{what}: {error_text(raised)}")
            error.__cause__ = raised
        # Ranks without an error take part too, since they must learn of the errors of others.
        messages = self.gather(str(error) if error is not None else None, what)
        if error is not None:
            # The rank that failed keeps its own traceback.
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise self.error(f"{message} (on rank {rank})")

    def gather(self, value: Any, what: str) -> list[Any]:
        """Gather a value from every rank, in rank order, on every rank; raise `error` if a rank is gone."""
        try:
            return gather_objects(value, world_group())
        except RuntimeError as error:
            raise self.error(f"{what}: another rank is gone ({error_text(error)})") from error

    def from_first_rank(self, value: Any, what: str) -> Any:
        """Broadcast rank 0's value to every rank; raise `error` if a rank is gone."""
        try:
            return broadcast_object(value, world_group())
        except RuntimeError as error:
            raise self.error(f"{what}: another rank is gone ({error_text(error)})") from error


def error_text(error: BaseException) -> str:
    """Format an error's class and message; for torch's CheckpointException, those of the first rank's error."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, wrapped = min(error.failures.items())
        return f"{error_text(wrapped[0])} (on rank {rank})"
    text = str(error).strip()
    # The message names the file and what is wrong with it; the class would add nothing.
    if isinstance(error, UnsafeFileError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
