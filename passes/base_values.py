"""Follow the operands of a base call through its ops, and say where it computes anything but W0 x + bias.

    example graph                       what each node holds
    %t = weight.t()                     weight.t()
    %matmul = torch.matmul(x, %t)       the product
    %add = %matmul + bias               the product with the bias

Views and the parts of collectives hold what they are made of: which rank has which part of a tensor is the layout's
business, and not looked at here. A node that reads no operand, such as an empty buffer, holds nothing until something
is written into it.

Looks only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dora_fx.passes.base_ops import PRODUCTS, SUMS, op_name, op_of, size_nodes
from dora_fx.passes.graph_utils import referenced_graph_maybe

X, WEIGHT, BIAS = "x", "weight", "bias"
PRODUCT, WITH_BIAS = "the product", "the product with the bias"
_SIZE = "a size"


class OtherFunctionError(Exception):
    """A node computes what no linear layer computes; its text says what was found and expected."""


def problem_of_values_maybe(
    nodes: Iterable[fx.Node], operands: dict[fx.Node, str], output: fx.Node, sizes: Iterable[fx.Node]
) -> str | None:
    """Return why a base call does not compute W0 x + bias, None where it does.

    Args:
        nodes: of the call, in graph order.
        operands: what the marker's own operands hold: `X`, `WEIGHT` and, if the layer adds one, `BIAS`.
        output: the node that the marker takes.
        sizes: the `size_nodes` of the graph.
    """
    held: dict[fx.Node, Any] = dict.fromkeys(sizes, _SIZE) | operands
    try:
        _follow(nodes, held)
    except OtherFunctionError as problem:
        return str(problem)
    expected = WITH_BIAS if BIAS in operands.values() else PRODUCT
    if held.get(output) != expected:
        return f"its base call returns {_text(held.get(output))}, expected {expected}"
    return None


def forward_body_maybe(node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that an `autograd_function_apply` runs forward, None if it cannot be read."""
    body = node.args[0] if node.args else None
    return referenced_graph_maybe(body) if isinstance(body, fx.Node) else None


def _follow(nodes: Iterable[fx.Node], held: dict[fx.Node, Any]) -> None:
    """Enter what each node holds: a text, None, or a tuple of them for a node with several results."""
    for node in nodes:
        if node in held or node.op in ("placeholder", "get_attr", "output"):
            continue
        op = op_of(node)
        if op is torch.ops.higher_order.autograd_function_apply:
            held[node] = _of_body(node, held)
        elif op in PRODUCTS:
            held[node] = _of_product(node, held)
        elif op in SUMS:
            held[node] = _of_sum(node, held)
        elif op is operator.getitem:
            held[node] = _of_item(node, held)
        elif op == "copy_":
            # A source that is a number, or given by name, holds nothing.
            target, source = (*node.args, None)[:2]
            held[node] = held[target] = held.get(source)  # type: ignore[arg-type, index]
        else:
            held[node] = _of_helper(node, held)


def _of_body(node: fx.Node, held: dict[fx.Node, Any]) -> Any:
    """The first result of a forward body is a tuple of outputs or an output, the second what backward reads."""
    body, operands = forward_body_maybe(node), node.args[2:]
    assert body is not None
    placeholders = body.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(operands):
        raise OtherFunctionError(
            f"the forward body of {node.name} takes {len(placeholders)} values, and its call has {len(operands)}"
        )
    inner: dict[fx.Node, Any] = dict.fromkeys(size_nodes(body.graph), _SIZE)
    for placeholder, operand in zip(placeholders, operands, strict=True):
        if isinstance(operand, fx.Node) and placeholder not in inner:
            inner[placeholder] = held.get(operand)
    _follow(body.graph.nodes, inner)
    [results] = body.graph.output_node().args
    outputs = results[0] if isinstance(results, (tuple, list)) and results else None
    return fx.node.map_aggregate(outputs, lambda part: inner.get(part) if isinstance(part, fx.Node) else None)


def _of_product(node: fx.Node, held: dict[fx.Node, Any]) -> str:
    found = [held.get(operand) for operand in _tensors(node, held)]
    weight = WEIGHT if op_of(node) is F.linear else _transposed(WEIGHT)
    if found == [X, weight]:
        return PRODUCT
    if found == [X, weight, BIAS]:
        return WITH_BIAS
    texts = ", ".join(map(_text, found))
    raise OtherFunctionError(f"the {op_name(node)} of its base call takes {texts}, expected {X}, {weight}")


def _of_sum(node: fx.Node, held: dict[fx.Node, Any]) -> str:
    found = [held.get(operand) for operand in _tensors(node, held)]
    if sorted(map(str, found)) == sorted((PRODUCT, BIAS)) and len(node.args) == 2 and not node.kwargs:
        return WITH_BIAS
    texts = ", ".join([*map(_text, found), *(str(value) for value in _constants(node))])
    raise OtherFunctionError(f"its base call adds {texts}, expected {PRODUCT} and the marker's bias alone")


def _of_item(node: fx.Node, held: dict[fx.Node, Any]) -> Any:
    source, index = node.args[:2]
    found = held.get(source)  # type: ignore[arg-type]
    if not isinstance(found, (tuple, list)):
        return found
    return found[index] if isinstance(index, int) and -len(found) <= index < len(found) else None


def _of_helper(node: fx.Node, held: dict[fx.Node, Any]) -> Any:
    """Views, parts and collectives hold what their tensors hold; `view_as` reads the shape alone of its second."""
    tensors = _tensors(node, held)
    found = {held.get(operand) for operand in (tensors[:1] if op_of(node) == "view_as" else tensors)}
    if len(found) > 1:
        texts = ", ".join(sorted(map(_text, found)))
        raise OtherFunctionError(f"the {op_name(node)} of its base call joins {texts}")
    [value] = found or {None}
    return _transposed(value) if op_of(node) == "t" else value


def _transposed(value: Any) -> Any:
    if value is None:
        return None
    return value.removesuffix(".t()") if value.endswith(".t()") else f"{value}.t()"


def _tensors(node: fx.Node, held: dict[fx.Node, Any]) -> list[fx.Node]:
    """The operands of a node that are no sizes, in the order of its arguments; one that stands twice comes twice."""
    tensors: list[fx.Node] = []

    def visit(operand: fx.Node) -> fx.Node:
        if held.get(operand) != _SIZE:
            tensors.append(operand)
        return operand

    fx.map_arg((node.args, node.kwargs), visit)
    return tensors


def _constants(node: fx.Node) -> Iterator[Any]:
    yield from (value for value in (*node.args, *node.kwargs.values()) if not isinstance(value, fx.Node))


def _text(value: Any) -> str:
    return "something else" if value is None else str(value)
