"""Facts of fx nodes that folding and messages read: fake values, bytes, names, and which nodes compute nothing."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.fx.graph import dtype_abbrs
from torch.utils._pytree import tree_leaves

import dora_fx.function as function
from dora_fx.explanation.collective_calls import is_collective
from dora_fx.explanation.layer_parts import TensorFacts
from dora_fx.passes import op_name, referenced_graph_maybe

# What gives another view of a tensor's elements, a part of a tuple, or a copy in another order.
_VIEWS = frozenset(
    {"alias", "as_strided", "detach", "expand", "expand_as", "getitem", "narrow", "select", "slice"}
    | {"view", "view_as", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
    | {"t", "transpose", "permute", "swapaxes", "movedim"}
    | {"chunk", "split", "split_with_sizes", "unbind", "unsafe_chunk", "unsafe_split", "wait_tensor"}
)
_ALLOCATIONS = frozenset({"empty", "empty_like", "new_empty", "empty_strided"})
_CONVERSIONS = frozenset({"to", "type", "type_as", "_to_copy", "float", "bfloat16", "half"})
_OWN_FUNCTIONS = f"{function.__name__}."
# How Dynamo names an input that is a module's: after the names of modules.
_OF_MODULE = re.compile(r"_(?:parameters|buffers)_(\w+?)_*$")


def value_of(node: fx.Node) -> Any:
    """Return the fake value of a node of a Dynamo or an ATen graph, None where there is none."""
    return node.meta.get("example_value", node.meta.get("val"))


def facts_of(tensor: torch.Tensor) -> TensorFacts:
    """Return a tensor's facts."""
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    return TensorFacts(shape, dtype_abbrs[tensor.dtype], num_bytes_maybe(tensor))


def num_bytes_maybe(tensor: torch.Tensor) -> int | None:
    """Return the size of a tensor's elements in bytes, None where it is symbolic."""
    nbytes = tensor.numel() * tensor.element_size()
    return nbytes if isinstance(nbytes, int) else None


def tensors_of(node: fx.Node) -> tuple[TensorFacts, ...]:
    """Return the facts of all tensors that a node returns."""
    return tuple(facts_of(leaf) for leaf in tree_leaves(value_of(node)) if isinstance(leaf, torch.Tensor))


def is_tensor(node: fx.Node) -> bool:
    """Return whether a node's value is a tensor."""
    return isinstance(value_of(node), torch.Tensor)


def is_number(node: fx.Node) -> bool:
    """Return whether a node's value is a tensor of a single element."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.numel() == 1


def module_tensor_name_maybe(placeholder: fx.Node) -> str | None:
    """Return the name of the parameter or buffer that an input of a Dynamo graph is, None for any other input.

    Copies of a graph have lost the sources of their inputs, so the name that Dynamo made of the source is read.
    """
    found = _OF_MODULE.search(str(placeholder.target))
    return found[1] if found else None


def viewed_maybe(node: fx.Node) -> fx.Node | None:
    """Return the operand that a node passes on without computing anything, None where it computes."""
    operands = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not operands:
        return None
    name, first = op_name(node), operands[0]
    if name in _VIEWS:
        # With a tensor as its index, `getitem` gathers.
        return None if name == "getitem" and any(map(is_tensor, operands[1:])) else first
    if name in _CONVERSIONS and is_tensor(node) and is_tensor(first):
        return first if value_of(node).dtype == value_of(first).dtype else None
    return None


def is_allocation(node: fx.Node) -> bool:
    """Return whether a node makes a tensor without values."""
    return node.op in ("call_function", "call_method") and op_name(node) in _ALLOCATIONS


def writes_in_place(node: fx.Node) -> bool:
    """Return whether a node writes into its first operand, by the convention for names."""
    name = op_name(node)
    return node.op in ("call_function", "call_method") and name.endswith("_") and not name.startswith("_")


def computed_ops(node: fx.Node) -> tuple[str, ...]:
    """Return the names of the ops by which a node computes; those of a body in place of an op that has one."""
    if is_collective(node.target):
        return ()
    bodies = [body for body in map(referenced_graph_maybe, node.all_input_nodes) if body is not None]
    if node.target is torch.ops.higher_order.autograd_function_apply:
        del bodies[1:]
    if not bodies:
        return (op_name(node),)
    return tuple(
        name
        for body in bodies
        for inner in body.graph.nodes
        if inner.op in ("call_function", "call_method") and _computes(inner)
        for name in computed_ops(inner)
    )


def _computes(node: fx.Node) -> bool:
    # What a collective returns is copied where Megatron has allocated it.
    return (
        bool(tensors_of(node)) and viewed_maybe(node) is None and not is_allocation(node) and op_name(node) != "copy_"
    )


def is_own_function(node: fx.Node) -> bool:
    """Return whether a node calls a function of the DoRA function's room."""
    module = getattr(node.target, "__module__", None)
    return isinstance(module, str) and module.startswith(_OWN_FUNCTIONS)
