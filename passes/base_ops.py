"""What the ops of a base call are: products, helpers, and sizes, which are no work on tensors.

Ops are recognised by their targets, as other libraries name ops of their own `linear`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_c10d = torch.ops._c10d_functional

# Targets of functions, and names of tensor methods.
PRODUCTS = frozenset({torch.matmul, torch.mm, operator.matmul, F.linear, "matmul", "mm"})
SUMS = frozenset({operator.add, torch.add, "add"})
# What else a Megatron linear does to a tensor: views, bias, and the parts of its collectives.
HELPERS = SUMS | frozenset(
    {"t", "view_as", "view", "reshape", "contiguous", "chunk", "split", "copy_"}
    | {operator.getitem, torch.empty, torch.cat, torch.chunk, torch.split}
    | {_c10d.wait_tensor, _c10d.all_reduce, _c10d.all_gather_into_tensor, _c10d.reduce_scatter_tensor}
    | {torch._C._set_grad_enabled}
    | {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
)
_SIZE_QUERIES = frozenset(
    {"size", "dim", "numel", "stride", getattr, torch.ops.aten.sym_size, torch.ops.aten.sym_numel}
    | {torch.ops.aten.sym_stride}
)


def op_of(node: fx.Node) -> Any:
    """Return what a node calls, by identity: a function, an op without its overload, or the name of a tensor method."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def op_name(node: fx.Node) -> str:
    """Return the bare name of what a node calls, for messages."""
    return getattr(op_of(node), "__name__", str(op_of(node)))


def size_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are sizes, parts of them or arithmetic on them, and so read no tensor's elements."""
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("example_value")
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if not all(isinstance(part, (int, torch.SymInt, torch.SymBool)) for part in parts):
            continue
        if node.op == "placeholder" or op_of(node) in _SIZE_QUERIES or sizes.issuperset(node.all_input_nodes):
            sizes.add(node)
    return sizes


def write_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that serve in-place writes alone, as everything does that is computed from them."""
    writes: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if not node.op.startswith("call") or op_of(node) not in HELPERS:
            continue
        if writes.issuperset(node.users) if node.users else op_of(node) == "copy_":
            writes.add(node)
    return writes
