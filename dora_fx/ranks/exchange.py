"""Exchange of Python objects between ranks. With one process, or in torch's "fake" group, a rank gets its own value."""

from __future__ import annotations

import datetime
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dora_fx.ranks.groups import has_other_ranks

T = TypeVar("T")

# How many exchanges through its store each group has made, by topic. Weak keys, so that a group that is destroyed takes
# its counts along.
_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Gather the value of every rank of the group, in rank order, on every rank; every rank calls it."""
    if group is None or not has_other_ranks(group):
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_objects_on_first_rank(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Gather the value of every rank of the group on its first rank; the other ranks get an empty list.

    Large values are then held by one rank, and not by each.
    """
    if group is None or not has_other_ranks(group):
        return [value]
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, dst=dist.get_process_group_ranks(group)[0])
    return values or []


def broadcast_object(value: T, group: dist.ProcessGroup | None) -> T:
    """Broadcast the value of the group's first rank to every rank; every rank calls it."""
    if group is None or not has_other_ranks(group):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_process_group_ranks(group)[0], group=group)
    return values[0]


def gather_through_store(
    group: dist.ProcessGroup, topic: str, value: str, timeout_s: float, explain: Callable[[int, list[int]], str]
) -> list[str]:
    """Gather a text from every rank of a group, through the group's store and not through a collective.

    A rank that calls this alone gets an error after the timeout, while the others may be in any other collective.
    The n-th call about a topic on one rank is matched with the n-th call on every other rank.

    Args:
        timeout_s: seconds to wait for the other ranks.
        explain: makes the error message from the exchange's number and the ranks that did not take part.

    Raises:
        RuntimeError: a rank did not take part within the timeout.
    """
    counts = _exchanges.setdefault(group, Counter())
    counts[topic] += 1
    number = counts[topic]
    store = group.get_group_store()
    # Keys are never used twice: a rank that is late by one exchange must not read the texts of the next.
    keys = [f"dora_fx/{topic} {number}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], value)
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(explain(number, missing)) from error
    return [store.get(key).decode() for key in keys]
