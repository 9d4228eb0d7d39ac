"""Tensor-parallel ranks must attach the same adapters and run the same graphs: notice when they do not.

A rank that runs other collectives than its peers hangs them, without a word, until the process group's timeout.
Both checks say instead which rank differs and in what.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import fx

from dora_fx.collectives import resolve_group

T = TypeVar("T")

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()


def is_real(group: dist.ProcessGroup) -> bool:
    """Whether the group has other processes to agree with; torch's "fake" backend has none."""
    return group.size() > 1 and dist.get_backend(group) != "fake"


def check_same_settings(settings: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Exchange settings over a group; every rank calls it.

    Raises:
        ValueError: on every rank, naming the first rank that differs from rank 0 of the group and in what.
    """
    if not is_real(group):
        return
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, dict(settings), group=group)
    for tp_rank, theirs in enumerate(found):
        for name in {**found[0], **theirs}:
            if theirs.get(name) != found[0].get(name):
                raise ValueError(
                    f"{name}: found {theirs.get(name)!r} on tensor-parallel rank {tp_rank} and "
                    f"{found[0].get(name)!r} on rank 0, expected the same on every rank"
                )


def of_all_stages(value: T) -> list[T]:
    """What every pipeline stage passes, first stage first; every rank calls it."""
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if group is None or not is_real(group):
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def value_of_first_replica(value: int) -> int:
    """The value that the first pipeline stage of the first data-parallel replica passes; every rank calls it."""
    if not parallel_state.model_parallel_is_initialized():
        return value
    value = of_all_stages(value)[0]
    return value_of_first_rank(value, parallel_state.get_data_parallel_group(with_context_parallel=True))


def value_of_first_rank(value: int, group: dist.ProcessGroup) -> int:
    """The value that rank 0 of the group passes; every rank calls it."""
    if not is_real(group):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_process_group_ranks(group)[0], group=group)
    return values[0]


def graph_fingerprint(gm: fx.GraphModule) -> str:
    """Hash of a graph's ops, shapes and edges, the same on all ranks that run it.

    Numbers among the arguments are left out: an embedding's first row differs between ranks.
    """
    digest = hashlib.sha256()
    positions: dict[fx.Node, int] = {}
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            positions[node] = len(positions)
            value = node.meta.get("example_value")
            shape = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
            target = node._pretty_print_target(node.target) if node.op.startswith("call") else ""
            inputs = [positions[operand] for operand in node.all_input_nodes]
            digest.update(f"{node.op} {target} {shape} {inputs}\n".encode())
    return digest.hexdigest()[:16]


def check_same_graph(gm: fx.GraphModule, tp_group: str, description: str, timeout_s: float) -> None:
    """Wait until every rank of a group compiles a graph, and compare.

    Args:
        gm: the graph after the passes.
        tp_group: name of the tensor-parallel group.
        description: of the graph, for the others' error messages.
        timeout_s: how long the other ranks may take to get here, in seconds.

    Raises:
        RuntimeError: another rank compiles another graph, or none within the timeout.
    """
    group = resolve_group(tp_group)
    if not is_real(group):
        return
    own = f"{graph_fingerprint(gm)} {description}"

    def explain(number: int, missing: list[int]) -> str:
        return (
            f"tensor-parallel rank {group.rank()} compiles graph {number} ({description}), and ranks {missing} did not "
            f"follow within {timeout_s:.0f} s: something that Dynamo guards on, such as an input's shape, differs "
            "between the ranks. TORCH_LOGS=recompiles shows what"
        )

    for rank, theirs in enumerate(_exchange_through_store(group, "graph", own, timeout_s, explain)):
        if theirs != own:
            raise RuntimeError(
                f"tensor-parallel ranks {group.rank()} and {rank} compile different graphs: {own!r} and {theirs!r}; "
                "expected the same model, configuration and input shapes on every rank"
            )


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
    if not is_real(group):
        return list(stale)

    def explain(number: int, missing: list[int]) -> str:
        return (
            f"{paths[stale[0]]}: parameters of {len(stale)} layers were written on tensor-parallel rank "
            f"{group.rank()} outside an optimizer's step, and ranks {missing} found no change of theirs within "
            f"{timeout_s:.0f} s; write on every rank, or call dora_fx.invalidate_norms(model) on every rank"
        )

    texts = _exchange_through_store(group, "refresh", json.dumps(list(stale)), timeout_s, explain)
    return sorted({index for text in texts for index in json.loads(text)})


def _exchange_through_store(
    group: dist.ProcessGroup, topic: str, value: str, timeout_s: float, explain: Callable[[int, list[int]], str]
) -> list[str]:
    """Bring together what every rank of a group says on its n-th exchange about a topic.

    Goes through the process group's store and not through a collective, so that a rank which comes alone finds out
    while the others are in the middle of something else.

    Args:
        explain: makes the error message, from the exchange's number and the ranks that did not come.

    Raises:
        RuntimeError: a rank did not come within the timeout.
    """
    counts = _exchanges.setdefault(group, Counter())
    counts[topic] += 1
    number = counts[topic]
    store = dist.distributed_c10d._get_default_store()
    members = dist.get_process_group_ranks(group)
    prefix = f"dora_fx/{group.group_name}/{members[0]}/{topic} {number}"
    keys = [f"{prefix}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], value)
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(explain(number, missing)) from error
    return [store.get(key).decode() for key in keys]


def raise_on_every_rank(problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Exchange what each rank found wrong; every rank of the group calls it, also with nothing to say.

    Args:
        problem: this rank's error message, None if all is well.
        group: None for one process by itself.

    Raises:
        ValueError: on every rank, with the message of the first rank that has one.
    """
    problems = [problem]
    if group is not None and is_real(group):
        problems = [None] * group.size()
        dist.all_gather_object(problems, problem, group=group)
    for group_rank, found in enumerate(problems):
        if found is not None:
            where = f" (found on rank {group_rank})" if len(problems) > 1 else ""
            raise ValueError(found + where)
