"""Run a list of passes over one graph, and leave a trace of what each did."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from torch import fx
from torch._logging import trace_structured

from dora_fx.passes.graph_utils import subgraph_modules, target_name

logger = logging.getLogger(__name__)


class GraphPass(Protocol):
    """A pass edits a Dynamo graph in place or returns another; configuration is bound with functools.partial."""

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule: ...


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], passes: Sequence[GraphPass]) -> fx.GraphModule:
    """Run the passes in order and return the last one's graph.

    The graphs before and after are artifacts of `TORCH_TRACE`; op counts and times go to this module's logger,
    `TORCH_LOGS="+dora_fx"`.
    """
    _dump("dora_fx_before", gm)
    for graph_pass in passes:
        before, begin = count_ops(gm), time.perf_counter()
        gm = graph_pass(gm, example_inputs)
        seconds = time.perf_counter() - begin
        logger.debug("%s took %.3f s: %s", _name(graph_pass), seconds, describe_change(before, count_ops(gm)))
    _dump("dora_fx_after", gm)
    return gm


def count_ops(gm: fx.GraphModule) -> Counter[str]:
    """Count the nodes of each target in a graph and its subgraphs."""
    return Counter(
        target_name(node)
        for module in subgraph_modules(gm)
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method")
    )


def describe_change(before: Counter[str], after: Counter[str]) -> str:
    """The difference of two op counts as text, `+2 add, -1 matmul`."""
    changes = {op: after[op] - before[op] for op in sorted({*before, *after}) if after[op] != before[op]}
    return ", ".join(f"{change:+d} {op}" for op, change in changes.items()) or "no change"


def _name(graph_pass: GraphPass) -> str:
    return getattr(getattr(graph_pass, "func", graph_pass), "__name__", repr(graph_pass))


def _dump(name: str, gm: fx.GraphModule) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
    )
