"""Ranks must attach the same adapters and refresh the same sites: notice when they do not.

A rank that runs other collectives than its peers hangs them, without a word, until the process group's timeout.
These checks say instead which rank differs and in what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from dora_fx.ranks.exchange import broadcast_object, gather_objects, gather_through_store
from dora_fx.ranks.groups import has_other_ranks, resolve_group

T = TypeVar("T")


def check_same_settings(settings: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Exchange settings over a group; every rank calls it.

    Raises:
        ValueError: on every rank, naming the first rank that differs from rank 0 of the group and in what.
    """
    found = gather_objects(dict(settings), group)
    for tp_rank, theirs in enumerate(found):
        for name in {**found[0], **theirs}:
            if theirs.get(name) != found[0].get(name):
                raise ValueError(
                    f"{name}: found {theirs.get(name)!r} on tensor-parallel rank {tp_rank} and "
                    f"{found[0].get(name)!r} on rank 0, expected the same on every rank"
                )


def of_all_stages(value: T) -> list[T]:
    """Return the value of every pipeline stage, first stage first; every rank calls it."""
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    return gather_objects(value, group)


def value_of_first_replica(value: int) -> int:
    """The value that the first pipeline stage of the first data-parallel replica passes; every rank calls it."""
    if not parallel_state.model_parallel_is_initialized():
        return value
    value = of_all_stages(value)[0]
    return broadcast_object(value, parallel_state.get_data_parallel_group(with_context_parallel=True))


def stale_on_any_rank(paths: Mapping[int, str], stale: Sequence[int], tp_group: str, timeout_s: float) -> list[int]:
    """Add up the sites that ranks of a group are about to refresh outside an optimizer's step.

    Args:
        paths: of all sites of a graph in the group, by their numbers, the same on every rank.
        stale: those that are stale on this rank, at least one.
        tp_group: name of the tensor-parallel group.
        timeout_s: how long the other ranks may take to find a stale site too, in seconds.

    Raises:
        RuntimeError: another rank has no stale site, and runs its graph with norms of other values.
    """
    group = resolve_group(tp_group)
    if not has_other_ranks(group):
        return list(stale)

    def explain(number: int, missing: list[int]) -> str:
        return (
            f"{paths[stale[0]]}: parameters of {len(stale)} layers were written on tensor-parallel rank "
            f"{group.rank()} outside an optimizer's step, and ranks {missing} found no change of theirs within "
            f"{timeout_s:.0f} s; write on every rank, or call dora_fx.invalidate_norms(model) on every rank"
        )

    texts = gather_through_store(group, "refresh", json.dumps(list(stale)), timeout_s, explain)
    return sorted({index for text in texts for index in json.loads(text)})


def raise_on_every_rank_of_model(problem: str | None, tp_groups: Iterable[dist.ProcessGroup]) -> None:
    """Exchange what each rank of a model found wrong; every rank calls it, also with nothing to say.

    Args:
        problem: this rank's error message, None if all is well.
        tp_groups: the groups of this rank's layers; a pipeline stage without any has none.

    Raises:
        ValueError: on every rank, with the message of one that has one.
    """
    groups: list[dist.ProcessGroup | None] = [*tp_groups]
    if parallel_state.model_parallel_is_initialized():
        groups.append(parallel_state.get_pipeline_model_parallel_group())
        groups.append(parallel_state.get_data_parallel_group(with_context_parallel=True))
    # What one dimension of the ranks heard, the next one hears of all of them.
    for group in groups:
        problem = next((found for found in gather_objects(problem, group) if found is not None), None)
    if problem is not None:
        raise ValueError(problem)


def raise_on_every_rank(problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Exchange what each rank found wrong; every rank of the group calls it, also with nothing to say.

    Args:
        problem: this rank's error message, None if all is well.
        group: None for one process by itself.

    Raises:
        ValueError: on every rank, with the message of the first rank that has one.
    """
    found = problem_of_any_rank_maybe(problem, group)
    if found is not None:
        raise ValueError(found)


def problem_of_any_rank_maybe(problem: str | None, group: dist.ProcessGroup | None) -> str | None:
    """The message of the first rank that has one, on every rank; see `raise_on_every_rank`."""
    problems = gather_objects(problem, group)
    for group_rank, found in enumerate(problems):
        if found is not None:
            is_said = len(problems) == 1 or " (found on rank " in found
            return found if is_said else f"{found} (found on rank {group_rank})"
    return None
