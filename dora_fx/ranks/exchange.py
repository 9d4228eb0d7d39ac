"""Python objects from rank to rank; with one process, or in torch's "fake" group, each rank hears itself alone."""

from __future__ import annotations

import datetime
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dora_fx.ranks.groups import has_other_ranks

T = TypeVar("T")

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The value of every rank of the group, in order of ranks, on every rank; every rank calls it."""
    if group is None or not has_other_ranks(group):
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_objects_on_first_rank(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Do as `gather_objects`, but the list is empty on all ranks but the group's first."""
    if group is None or not has_other_ranks(group):
        return [value]
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, dst=dist.get_process_group_ranks(group)[0])
    return values or []


def broadcast_object(value: T, group: dist.ProcessGroup | None) -> T:
    """The value of the group's first rank, on every rank; every rank calls it."""
    if group is None or not has_other_ranks(group):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_process_group_ranks(group)[0], group=group)
    return values[0]


def gather_through_store(
    group: dist.ProcessGroup, topic: str, value: str, timeout_s: float, explain: Callable[[int, list[int]], str]
) -> list[str]:
    """Bring together what every rank of a group says on its n-th exchange about a topic.

    Goes through the process group's store and not through a collective, so that a rank which comes alone finds out
    while the others are in the middle of something else.

    Args:
        timeout_s: how long the other ranks may take, in seconds.
        explain: makes the error message, from the exchange's number and the ranks that did not come.

    Raises:
        RuntimeError: a rank did not come within the timeout.
    """
    counts = _exchanges.setdefault(group, Counter())
    counts[topic] += 1
    number = counts[topic]
    store = group.get_group_store()
    keys = [f"dora_fx/{topic} {number}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], value)
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(explain(number, missing)) from error
    return [store.get(key).decode() for key in keys]
