"""A step that several ranks take succeeds on all of them or fails on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from dora_fx.files.regular_file import UnsafeFileError
from dora_fx.ranks.exchange import broadcast_object, gather_objects
from dora_fx.ranks.groups import world_group


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or cannot be loaded; nothing was changed."""


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Run the block on every rank of the default group; when it raises on one rank, every rank raises.

    Args:
        what: the step, for messages, such as "writing the tensors".

    Raises:
        CheckpointError: the block raised, here or on another rank, or another rank is gone.
    """
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as raised:
        error = raised
    except (Exception, CheckpointException) as raised:
        error = CheckpointError(f"{what}: {describe_error(raised)}")
        error.__cause__ = raised
    messages = gather(str(error) if error is not None else None, what)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"{message} (on rank {rank})")


def describe_error(error: BaseException) -> str:
    """Kind and text of an error; of torch's collection of errors of many ranks, the first one's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, wrapped = min(error.failures.items())
        return f"{describe_error(wrapped[0])} (on rank {rank})"
    text = str(error).strip()
    if isinstance(error, UnsafeFileError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def gather(value: Any, what: str) -> list[Any]:
    """The value of every rank, in order of ranks, on every rank.

    Raises:
        CheckpointError: another rank is gone.
    """
    try:
        return gather_objects(value, world_group())
    except RuntimeError as error:
        raise CheckpointError(f"{what}: another rank is gone ({describe_error(error)})") from error


def from_first_rank(value: Any, what: str) -> Any:
    """The value of rank 0, on every rank.

    Raises:
        CheckpointError: another rank is gone.
    """
    try:
        return broadcast_object(value, world_group())
    except RuntimeError as error:
        raise CheckpointError(f"{what}: another rank is gone ({describe_error(error)})") from error
