"""A step that several ranks take succeeds on all of them or fails on all of them."""

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
class FailingTogether:
    """Steps of all ranks of the default group that raise on every rank when one of them fails.

    Attributes:
        error: what they raise; where the step itself raised it, its message stays as it is.
    """

    error: type[RuntimeError]

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Run the block on every rank; when it raises on one of them, every rank raises `error`.

        Args:
            what: the step, for messages, such as "writing the tensors".
        """
        error: RuntimeError | None = None
        try:
            yield
        except self.error as raised:
            error = raised
        except (Exception, CheckpointException) as raised:
            error = self.error(f"{what}: {describe_error(raised)}")
            error.__cause__ = raised
        messages = self.gather(str(error) if error is not None else None, what)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise self.error(f"{message} (on rank {rank})")

    def gather(self, value: Any, what: str) -> list[Any]:
        """The value of every rank, in order of ranks, on every rank; raises `error` if a rank is gone."""
        try:
            return gather_objects(value, world_group())
        except RuntimeError as error:
            raise self.error(f"{what}: another rank is gone ({describe_error(error)})") from error

    def from_first_rank(self, value: Any, what: str) -> Any:
        """The value of rank 0, on every rank; raises `error` if a rank is gone."""
        try:
            return broadcast_object(value, world_group())
        except RuntimeError as error:
            raise self.error(f"{what}: another rank is gone ({describe_error(error)})") from error


def describe_error(error: BaseException) -> str:
    """Kind and text of an error; of torch's collection of errors of many ranks, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, wrapped = min(error.failures.items())
        return f"{describe_error(wrapped[0])} (on rank {rank})"
    text = str(error).strip()
    if isinstance(error, UnsafeFileError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
