"""Checks that ranks agree: on the settings of adapters, on the sites to refresh, on whether something is wrong.

A rank that calls other collectives than its peers makes them hang silently until the process group's timeout. These
checks raise an error instead that names the rank and the difference.
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


def check_same_settings(settings: Mapping[str, Any], group: dist.ProcessGroup, kind: str = "tensor-parallel") -> None:
    """Check that all ranks of a group pass the same settings; every rank calls it.

    Args:
        kind: of the group's ranks, for messages.

    Raises:
        ValueError: on every rank, naming the first setting and rank that differ from rank 0 of the group.
    """
    settings_of_ranks = gather_objects(dict(settings), group)
    first = settings_of_ranks[0]
    for rank, own in enumerate(settings_of_ranks):
        # A rank may lack a setting that rank 0 has, such as the path of a layer, or have one more.
        for name in {**first, **own}:
            if own.get(name) != first.get(name):
                raise ValueError(
                    f"{name}: found {own.get(name)!r} on {kind} rank {rank} and {first.get(name)!r} on "
                    "rank 0, expected the same on every rank"
                )


def of_all_parts(value: T) -> list[T]:
    """Gather a value from every rank that holds other layers or experts, by pipeline stage; every rank calls it."""
    experts = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    stages = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    return [each for of_stage in gather_objects(gather_objects(value, experts), stages) for each in of_stage]


def value_of_first_replica(value: int) -> int:
    """Broadcast the value of the first rank of the model; every rank calls it."""
    if not parallel_state.model_parallel_is_initialized():
        return value
    # Along each axis of the mesh in turn. Layers' own groups do not serve: experts may be in one of one rank each.
    value = broadcast_object(value, parallel_state.get_tensor_model_parallel_group())
    value = of_all_parts(value)[0]
    return broadcast_object(value, parallel_state.get_data_parallel_group(with_context_parallel=True))


def stale_on_any_rank(paths: Mapping[int, str], stale: Sequence[int], tp_group: str, timeout_s: float) -> list[int]:
    """Return the union of the sites that ranks of a group are about to refresh outside an optimizer's step.

    Args:
        paths: number -> path of every site of a graph in the group, the same on every rank.
        stale: numbers of the sites that are stale on this rank, at least one.
        tp_group: name of the tensor-parallel group.
        timeout_s: seconds to wait for the other ranks to find a stale site too.

    Raises:
        RuntimeError: another rank has found no stale site, so it would run its graph with norms of other parameters.
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

    # A collective would hang here: the ranks without stale sites do not call this function.
    texts = gather_through_store(group, "refresh", json.dumps(list(stale)), timeout_s, explain)
    return sorted({index for text in texts for index in json.loads(text)})


def raise_on_every_rank_of_model(problem: str | None, tp_groups: Iterable[dist.ProcessGroup]) -> None:
    """Raise on every rank of a model if one of them has a problem; every rank calls it, with a problem or None.

    Args:
        problem: this rank's error message, None if all is well.
        tp_groups: tensor-parallel groups of this rank's layers; empty on a pipeline stage without adapted layers.

    Raises:
        ValueError: on every rank, with the message of one of the ranks that pass one.
    """
    groups: list[dist.ProcessGroup | None] = [*tp_groups]
    if parallel_state.model_parallel_is_initialized():
        # Experts' own groups may have one rank each.
        groups.append(parallel_state.get_tensor_model_parallel_group())
        groups.append(parallel_state.get_pipeline_model_parallel_group())
        groups.append(parallel_state.get_data_parallel_group(with_context_parallel=True))
    # Each exchange runs along one axis of the mesh and passes on what the axes before it brought in, so that after the
    # last one every rank of the model has the problem. There is no one group that has just these ranks.
    for group in groups:
        problem = next((message for message in gather_objects(problem, group) if message is not None), None)
    if problem is not None:
        raise ValueError(problem)


def raise_on_every_rank(problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank of a group if one of them has a problem; every rank calls it, with a problem or None.

    Args:
        problem: this rank's error message, None if all is well.
        group: None for one process by itself.

    Raises:
        ValueError: on every rank, with the message of the first rank that passes one.
    """
    problem = problem_of_any_rank_maybe(problem, group)
    if problem is not None:
        raise ValueError(problem)


def problem_of_any_rank_maybe(problem: str | None, group: dist.ProcessGroup | None) -> str | None:
    """Return the first rank's problem on every rank, with the rank's number; every rank calls it.

    Args:
        problem: this rank's error message, None if all is well.
        group: None for one process by itself.
    """
    problems = gather_objects(problem, group)
    for group_rank, message in enumerate(problems):
        if message is not None:
            # A message that went through another group before already names the rank where it arose.
            names_rank = len(problems) == 1 or " (found on rank " in message
            return message if names_rank else f"{message} (found on rank {group_rank})"
    return None
