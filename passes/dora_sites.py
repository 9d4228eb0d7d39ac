"""Find DoRA sites in a Dynamo graph: a marker and the Megatron linear call whose output it takes.

    example graph                                              a `DoRASite` of it
    %t = weight.t()                                            base_call = (t, matmul)
    %matmul = torch.matmul(x, %t)
    %dora_linear = dora_linear(%matmul, x, None, weight, ...)  marker, marked

Megatron's call has many shapes: one or two `autograd_function_apply` higher-order ops with their `getitem`s,
plain ops where no gradient is needed, a collective before or after the product, a bias inside or outside. All of
them are one thing here: the nodes between the marker's `x`, `weight` and `bias` and its `base_output`. Those are
collected by walking back, the bodies of higher-order ops are read as lists of ops, and the call is accepted if it
multiplies by the weight once and does nothing that a Megatron linear does not do. Ops are told by their targets:
other libraries name ops of their own `linear`. Symbolic sizes, and arithmetic on them, are no work on tensors and may
be anything. The autograd functions' arity and their backward bodies change between Megatron's versions, so nothing
here looks at them.

A layer that computes its own product at its marker has no base output, and its site no base call.

A call that is not understood, or not in the graph because the graph broke inside the base layer, is no base call:
its site carries the reason instead.

Looks only; `rewrite_dora_pass.py` edits.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dora_fx.modules import MarkedSite, dora_linear, unpack
from dora_fx.passes.graph_utils import module_path, referenced_graph_maybe, source_line, subgraph_modules

logger = logging.getLogger(__name__)

_c10d = torch.ops._c10d_functional

# Targets of functions, and names of tensor methods.
PRODUCTS = frozenset({torch.matmul, torch.mm, operator.matmul, F.linear, "matmul", "mm"})
# What else a Megatron linear does to a tensor: views, bias, and the parts of its collectives.
HELPERS = frozenset(
    {"t", "view_as", "view", "reshape", "contiguous", "add", "chunk", "split", "copy_"}
    | {operator.getitem, operator.add, torch.add, torch.empty, torch.cat, torch.chunk, torch.split}
    | {_c10d.wait_tensor, _c10d.all_reduce, _c10d.all_gather_into_tensor, _c10d.reduce_scatter_tensor}
    | {torch._C._set_grad_enabled}
    | {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
)
_SIZE_QUERIES = frozenset(
    {"size", "dim", "numel", "stride", getattr, torch.ops.aten.sym_size, torch.ops.aten.sym_numel}
    | {torch.ops.aten.sym_stride}
)


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
        problem: why the base call cannot be read, None where it can.
    """

    marker: fx.Node
    base_call: tuple[fx.Node, ...]
    op_names: tuple[str, ...]
    path: str
    problem: str | None = None

    @property
    def marked(self) -> MarkedSite:
        """The marker's arguments by name: nodes, constants, or None."""
        return unpack(self.marker.args)


def find_dora_sites(gm: fx.GraphModule) -> list[DoRASite]:
    """Return every DoRA site of a graph and of the subgraphs it calls, in graph order."""
    return [
        _describe_site(marker)
        for module in subgraph_modules(gm)
        for marker in module.graph.find_nodes(op="call_function", target=dora_linear)
    ]


def _describe_site(marker: fx.Node) -> DoRASite:
    marked: Any = unpack(marker.args)
    if marked.base_output is None:
        return DoRASite(marker, (), (), module_path(marker))
    boundary = {node for node in (marked.x, marked.stored.weight, marked.bias) if isinstance(node, fx.Node)}
    call = _nodes_between(boundary, marked.base_output)
    call -= _sizes_used_outside(call, marker)
    ops = list(_tensor_ops(sorted(call)))
    path, names = module_path(marker), tuple(map(_op_name, ops))
    problem = _problem_maybe(marker, call, ops, boundary)
    if problem is not None:
        return DoRASite(marker, (), names, path, f"{problem} ({source_line(marker)})")
    logger.debug("%s: site %s over %s", path, marker.name, names)
    return DoRASite(marker, tuple(sorted(call)), names, path)


def _nodes_between(boundary: set[fx.Node], last: fx.Node) -> set[fx.Node]:
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
        pending += [user for user in node.users if _ends_in_writes(user)]
    return found


def _sizes_used_outside(call: set[fx.Node], marker: fx.Node) -> set[fx.Node]:
    """The sizes among the nodes of a call that the rest of the graph needs too, with those they are computed from."""
    kept: set[fx.Node] = set()
    pending = [
        node for node in call if _is_size(node) and any(user not in call and user is not marker for user in node.users)
    ]
    while pending:
        node = pending.pop()
        if node not in kept and node in call and _is_size(node):
            kept.add(node)
            pending += node.all_input_nodes
    return kept


def _is_size(node: fx.Node) -> bool:
    """Return whether a node is a size, a part of one or arithmetic on some, and so reads no tensor's elements."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(part, (int, torch.SymInt, torch.SymBool)) for part in parts):
        return False
    return node.op == "placeholder" or _op(node) in _SIZE_QUERIES or all(map(_is_size, node.all_input_nodes))


def _ends_in_writes(node: fx.Node) -> bool:
    """Return whether a node and everything computed from it serves in-place writes alone."""
    if node.op == "output" or _op(node) not in HELPERS:
        return False
    return all(map(_ends_in_writes, node.users)) if node.users else _op(node) == "copy_"


def _problem_maybe(marker: fx.Node, call: set[fx.Node], ops: list[fx.Node], boundary: set[fx.Node]) -> str | None:
    base_output = marker.args[0]
    assert isinstance(base_output, fx.Node)
    if base_output.op == "placeholder":
        return "its base call is not in the same graph: the graph broke inside the base layer or right after it"
    num_products = sum(_op(node) in PRODUCTS for node in ops)
    if num_products != 1:
        return f"its base call has {num_products} matrix products, expected 1; ops are {list(map(_op_name, ops))}"
    unknown = sorted({_op_name(node) for node in ops if _op(node) not in PRODUCTS | HELPERS})
    if unknown:
        return f"its base call has ops that no Megatron linear has: {unknown}"
    operands = {operand for node in call for operand in node.all_input_nodes}
    stray = sorted(operand.name for operand in operands - call - boundary if not _is_size(operand))
    if stray:
        return f"its base call reads {stray}, expected only the marker's input, weight and bias"
    for node in sorted(call):
        outside = [user.name for user in node.users if user not in call and user is not marker]
        if outside:
            what = "base output" if node is base_output else f"node {node.name} of its base call"
            return f"the {what} is also used by {outside}"
    return None


def _tensor_ops(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The ops on tensors that run, with those of the forward body in place of each higher-order op."""
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr") or _is_size(node):
            continue
        if node.target is torch.ops.higher_order.autograd_function_apply:
            body = referenced_graph_maybe(node.all_input_nodes[0])
            assert body is not None, f"{node.name} has no forward body"
            yield from _tensor_ops(list(body.graph.nodes))
        else:
            yield node


def _op(node: fx.Node) -> Any:
    """Return what a node calls, by identity: a function, an op without its overload, or the name of a tensor method."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def _op_name(node: fx.Node) -> str:
    return getattr(_op(node), "__name__", str(_op(node)))
