"""Find DoRA sites in a Dynamo graph: a marker and the Megatron linear call whose output it takes.

    example graph                                              a `DoRASite` of it
    %t = weight.t()                                            base_call = (t, matmul)
    %matmul = torch.matmul(x, %t)
    %dora_linear = dora_linear(%matmul, x, None, weight, ...)  marker, marked

Megatron's call has many shapes: one or two `autograd_function_apply` higher-order ops with their `getitem`s, plain
ops where no gradient is needed, a collective before or after the product, a bias inside or outside. All of them are
one thing here: the nodes between the marker's `x`, `weight` and `bias` and its `base_output`. Those are collected by
walking back, and the bodies of higher-order ops are read as lists of ops. The call is accepted if it has one product,
otherwise only the ops of Megatron's linears (`base_ops.py`), and if the product is that of x and the weight, to which
nothing but the bias is added (`base_values.py`). Symbolic sizes, and arithmetic on them, are no work on tensors and
may be anything. The backward bodies of autograd functions change between Megatron's versions, and nothing here looks
at them.

A layer that computes its own product at its marker has no base output, and its site no base call.

A call that is not understood, or not in the graph because the graph broke inside the base layer, is no base call:
its site carries the reason instead.

Looks only; `rewrite_dora_pass.py` edits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dora_fx.function import QuantisedWeight
from dora_fx.modules import MarkedSite, dora_linear, read_site
from dora_fx.passes.base_ops import HELPERS, PRODUCTS, op_name, op_of, size_nodes, write_nodes
from dora_fx.passes.base_values import BIAS, WEIGHT, X, forward_body_maybe, problem_of_values_maybe
from dora_fx.passes.graph_utils import module_path, source_line, subgraph_modules

logger = logging.getLogger(__name__)


class UnmatchedDoRASiteError(ValueError):
    """The base call of a marked layer cannot be read from the graph, and the user asked for an error then."""


@dataclass(frozen=True)
class DoRASite:
    """One adapted layer in a graph.

    Attributes:
        marker: the `dora_linear` node.
        base_call: the base layer's own nodes, in graph order; nothing outside uses them. Empty where they cannot be
            read, and where the layer is not called.
        op_names: the ops of the base call, those inside higher-order ops included, without work on sizes.
        path: module path, for messages; "" where Dynamo recorded none.
        problem: why the base call cannot be read, None where it can, and where it is not to be read.
        keeps_base: the base layer's output is taken as it is.
    """

    marker: fx.Node
    base_call: tuple[fx.Node, ...]
    op_names: tuple[str, ...]
    path: str
    problem: str | None = None
    keeps_base: bool = False

    @property
    def marked(self) -> MarkedSite:
        """The marker's operands: nodes, constants, or None."""
        return read_site(self.marker.kwargs)


@dataclass(frozen=True)
class _Surroundings:
    """What the finder knows of every node of one graph: which are sizes, and which serve in-place writes alone."""

    sizes: set[fx.Node]
    writes: set[fx.Node]


def find_dora_sites(gm: fx.GraphModule) -> list[DoRASite]:
    """Return every DoRA site of a graph and of the subgraphs it calls, in graph order."""
    sites = []
    for module in subgraph_modules(gm):
        markers = module.graph.find_nodes(op="call_function", target=dora_linear)
        if markers:
            around = _Surroundings(size_nodes(module.graph), write_nodes(module.graph))
            sites += [_read_site(marker, around) for marker in markers]
    return sites


def _read_site(marker: fx.Node, around: _Surroundings) -> DoRASite:
    marked: Any = read_site(marker.kwargs)
    if marked.base_output is None:
        return DoRASite(marker, (), (), module_path(marker))
    if isinstance(marked.stored.weight, QuantisedWeight):
        # Its product is a matter of the package that the weight is of.
        return DoRASite(marker, (), (), module_path(marker), keeps_base=True)
    operands = {marked.x: X, marked.stored.weight: WEIGHT}
    if marked.bias is not None:
        operands[marked.bias] = BIAS
    call = _nodes_between(set(operands), marked.base_output, around.writes)
    call -= _sizes_used_outside(call, marker, around.sizes)
    ops = list(_tensor_ops(sorted(call), around.sizes))
    path, names = module_path(marker), tuple(map(op_name, ops))
    problem = (
        _problem_of_ops_maybe(marked.base_output, ops)
        or _problem_of_edges_maybe(marker, call, set(operands), around.sizes)
        or problem_of_values_maybe(sorted(call), operands, marked.base_output, around.sizes)
    )
    if problem is not None:
        return DoRASite(marker, (), names, path, f"{problem} ({source_line(marker)})", keeps_base=True)
    logger.debug("%s: site %s over %s", path, marker.name, names)
    return DoRASite(marker, tuple(sorted(call)), names, path)


def _nodes_between(boundary: set[fx.Node], last: fx.Node, writes: set[fx.Node]) -> set[fx.Node]:
    """All nodes that `last` is computed from, up to the boundary, and the in-place writes into them.

    Without gradients Megatron's all-reduce ends in a `copy_` back into the product, whose result nobody uses.
    """
    found: set[fx.Node] = set()
    pending = [last]
    while pending:
        node = pending.pop()
        if node in found or node in boundary or node.op == "placeholder":
            continue
        found.add(node)
        pending += node.all_input_nodes
        pending += [user for user in node.users if user in writes]
    return found


def _sizes_used_outside(call: set[fx.Node], marker: fx.Node, sizes: set[fx.Node]) -> set[fx.Node]:
    """The sizes among the nodes of a call that the rest of the graph needs too, with those they are computed from."""
    kept: set[fx.Node] = set()
    pending = [node for node in call & sizes if any(user not in call and user is not marker for user in node.users)]
    while pending:
        node = pending.pop()
        if node not in kept and node in call and node in sizes:
            kept.add(node)
            pending += node.all_input_nodes
    return kept


def _problem_of_ops_maybe(base_output: fx.Node, ops: list[fx.Node]) -> str | None:
    if base_output.op == "placeholder":
        return "its base call is not in the same graph: the graph broke inside the base layer or right after it"
    for node in ops:
        if op_of(node) is torch.ops.higher_order.autograd_function_apply:
            return f"the forward body of {node.name}, in its base call, is not in the graph"
    num_products = sum(op_of(node) in PRODUCTS for node in ops)
    if num_products != 1:
        return f"its base call has {num_products} matrix products, expected 1; ops are {list(map(op_name, ops))}"
    unknown = sorted({op_name(node) for node in ops if op_of(node) not in PRODUCTS | HELPERS})
    if unknown:
        return f"its base call has ops that no Megatron linear has: {unknown}"
    return None


def _problem_of_edges_maybe(
    marker: fx.Node, call: set[fx.Node], boundary: set[fx.Node], sizes: set[fx.Node]
) -> str | None:
    operands = {operand for node in call for operand in node.all_input_nodes}
    stray = sorted(operand.name for operand in operands - call - boundary - sizes)
    if stray:
        return f"its base call reads {stray}, expected only the marker's input, weight and bias"
    for node in sorted(call):
        outside = [user.name for user in node.users if user not in call and user is not marker]
        if outside:
            is_output = node is marker.kwargs["base_output"]
            what = "base output" if is_output else f"node {node.name} of its base call"
            return f"the {what} is also used by {outside}"
    return None


def _tensor_ops(nodes: Iterable[fx.Node], sizes: set[fx.Node]) -> Iterator[fx.Node]:
    """The ops on tensors that run, with those of the forward body in place of each higher-order op that has one."""
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr") or node in sizes:
            continue
        is_function = node.target is torch.ops.higher_order.autograd_function_apply
        body = forward_body_maybe(node) if is_function else None
        if body is None:
            yield node
        else:
            yield from _tensor_ops(body.graph.nodes, size_nodes(body.graph))
