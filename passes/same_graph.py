"""Tensor-parallel ranks must run the same graphs: notice when they do not, before one hangs the others."""

from __future__ import annotations

import hashlib

import torch
from torch import fx

from dora_fx.passes.graph_utils import target_name
from dora_fx.ranks import gather_through_store, has_other_ranks, resolve_group


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
            target = target_name(node) if node.op.startswith("call") else ""
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
    if not has_other_ranks(group):
        return
    own = f"{graph_fingerprint(gm)} {description}"

    def explain(number: int, missing: list[int]) -> str:
        return (
            f"tensor-parallel rank {group.rank()} compiles graph {number} ({description}), and ranks {missing} did not "
            f"follow within {timeout_s:.0f} s: something that Dynamo guards on, such as an input's shape, differs "
            "between the ranks. TORCH_LOGS=recompiles shows what"
        )

    for rank, theirs in enumerate(gather_through_store(group, "graph", own, timeout_s, explain)):
        if theirs != own:
            raise RuntimeError(
                f"tensor-parallel ranks {group.rank()} and {rank} compile different graphs: {own!r} and {theirs!r}; "
                "expected the same model, configuration and input shapes on every rank"
            )
