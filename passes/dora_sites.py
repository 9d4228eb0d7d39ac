"""Find DoRA sites in a Dynamo graph: a marker and the Megatron linear call whose output it takes.

    example graph                                              a `DoRASite` of it
    %t = weight.t()                                            base_call = (t, matmul)
    %matmul = torch.matmul(x, %t)
    %dora_linear = dora_linear(%matmul, x, weight, ...)        marker, operands

Megatron's call has many shapes: one or two `autograd_function_apply` higher-order ops with their `getitem`s,
plain ops where no gradient is needed, a collective before or after the product, a bias inside or outside. All of
them are one thing here: the nodes between the marker's `x`, `weight` and `bias` and its `base_output`. Those are
collected by walking back, the bodies of higher-order ops are read as lists of op names, and the call is accepted
if it multiplies by the weight once and does nothing that a Megatron linear does not do. The autograd functions'
arity and their backward bodies change between Megatron's versions, so nothing here looks at them.

Looks only; `rewrite_dora_pass.py` edits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dora_fx.ops import dora_linear
from dora_fx.passes.graph_utils import module_path, referenced_graph_maybe, source_line, subgraph_modules

logger = logging.getLogger(__name__)

PRODUCTS = frozenset({"matmul", "mm", "linear"})
# What else a Megatron linear does to a tensor: views, bias, and the parts of its collectives.
HELPERS = frozenset(
    {"t", "view_as", "view", "reshape", "contiguous", "add", "getitem", "get_attr", "_set_grad_enabled"}
    | {"empty", "chunk", "cat", "split", "copy_", "wait_tensor"}
    | {"all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"}
    | {"_enter_autocast", "_exit_autocast"}
)


class UnsupportedDoRASiteError(ValueError):
    """A marked layer whose base call is not a Megatron linear as this pass knows them."""


@dataclass(frozen=True)
class DoRASite:
    """One adapted layer in a graph.

    Attributes:
        marker: the `dora_linear` node.
        base_call: the base layer's own nodes, in graph order; nothing outside uses them.
        op_names: the ops of the base call, those inside higher-order ops included.
        path: module path, for messages.
    """

    marker: fx.Node
    base_call: tuple[fx.Node, ...]
    op_names: tuple[str, ...]
    path: str

    @property
    def operands(self) -> dict[str, Any]:
        """The marker's arguments by name: nodes, constants, or None for a missing bias."""
        names = dora_linear.__code__.co_varnames[: len(self.marker.args)]
        return {**dict(zip(names, self.marker.args, strict=True)), **self.marker.kwargs}


def find_dora_sites(gm: fx.GraphModule) -> list[DoRASite]:
    """Return every DoRA site of a graph and of the subgraphs it calls, in graph order.

    Raises:
        UnsupportedDoRASiteError: naming the module, the node and the source line of a marked call that
            is not understood. Leaving it alone would still be correct, but slow without a word.
    """
    return [_describe_site(marker) for marker in _markers(gm)]


def tensor_parallel_groups(gm: fx.GraphModule) -> list[str]:
    """Names of the process groups that the DoRA sites of a graph communicate over, sorted."""
    return sorted({str(marker.kwargs["tp_group"]) for marker in _markers(gm)} - {""})


def _markers(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for module in subgraph_modules(gm):
        yield from module.graph.find_nodes(op="call_function", target=dora_linear)


def _describe_site(marker: fx.Node) -> DoRASite:
    base_output, x, weight, bias = marker.args[:4]
    assert isinstance(base_output, fx.Node)
    boundary = {node for node in (x, weight, bias) if isinstance(node, fx.Node)}
    call = _nodes_between(boundary, base_output)
    site = DoRASite(marker, tuple(sorted(call)), tuple(_op_names(sorted(call))), module_path(marker))
    problem = _problem_maybe(site, call, boundary, base_output)
    if problem is not None:
        raise UnsupportedDoRASiteError(
            f"{site.path or 'a module without a recorded path'}: cannot rewrite DoRA node {marker.name}: {problem} "
            f"({source_line(marker)})"
        )
    logger.debug("%s: site %s over %s", site.path, marker.name, site.op_names)
    return site


def _nodes_between(boundary: set[fx.Node], last: fx.Node) -> set[fx.Node]:
    """All nodes that `last` is computed from, up to the boundary, and the in-place writes into them.

    Without gradients Megatron's all-reduce ends in a `copy_` back into the product, whose result nobody uses.
    """
    found: set[fx.Node] = set()
    pending = [last]
    while pending:
        node = pending.pop()
        if node in found or node in boundary or node.op == "placeholder" or _is_size(node):
            continue
        found.add(node)
        pending += node.all_input_nodes
        pending += [user for user in node.users if _ends_in_writes(user)]
    return found


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a symbolic size, which Dynamo passes into the bodies of higher-order ops by itself."""
    return isinstance(node.meta.get("example_value"), (int, torch.SymInt))


def _ends_in_writes(node: fx.Node) -> bool:
    """Whether a node and everything computed from it serves in-place writes alone."""
    if node.op == "output" or _op_name(node) not in HELPERS:
        return False
    return all(map(_ends_in_writes, node.users)) if node.users else _op_name(node) == "copy_"


def _problem_maybe(site: DoRASite, call: set[fx.Node], boundary: set[fx.Node], base_output: fx.Node) -> str | None:
    products = [name for name in site.op_names if name in PRODUCTS]
    if len(products) != 1:
        return f"its base call has {len(products)} matrix products, expected 1; ops are {list(site.op_names)}"
    unknown = sorted(set(site.op_names) - PRODUCTS - HELPERS)
    if unknown:
        return f"its base call has ops that no Megatron linear has: {unknown}"
    stray = sorted(
        {
            operand.name
            for node in call
            for operand in node.all_input_nodes
            if operand not in call | boundary and not _is_size(operand)
        }
    )
    if stray:
        return f"its base call reads {stray}, expected only the marker's input, weight and bias"
    for node in call:
        outside = [user.name for user in node.users if user not in call and user is not site.marker]
        if outside:
            what = "base output" if node is base_output else f"node {node.name} of its base call"
            return f"the {what} is also used by {outside}"
    return None


def _op_names(nodes: list[fx.Node]) -> Iterator[str]:
    """Names of the ops that run, with the forward body in place of each higher-order op."""
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target is torch.ops.higher_order.autograd_function_apply:
            body = referenced_graph_maybe(node.all_input_nodes[0])
            assert body is not None, f"{node.name} has no forward body"
            yield from _op_names(list(body.graph.nodes))
        elif node.op != "get_attr":
            yield _op_name(node)


def _op_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return getattr(node.target, "__name__", str(node.target))
