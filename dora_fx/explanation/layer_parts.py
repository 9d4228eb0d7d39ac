"""What a description of a layer consists of: plain values, which `dataclasses.asdict` turns into JSON's types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["base", "dora", "input", "output"]
When = Literal["forward", "backward"]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor without its values.

    Attributes:
        shape: sizes; the text of those that are symbolic.
        dtype: as fx writes it, "bf16" for example.
        nbytes: None where a size is symbolic.
    """

    shape: tuple[int | str, ...]
    dtype: str
    nbytes: int | None


@dataclass(frozen=True)
class Operand:
    """A parameter or buffer that a box reads; `name` is A, B, m, s, W0 and so on for those of an adapted layer."""

    name: str
    tensor: TensorFacts


@dataclass(frozen=True)
class Message:
    """Equal messages that a box sends.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", or the name of another op.
        nbytes: of the larger side, the whole tensor of a gather or a reduce-scatter.
    """

    kind: str
    when: When
    group_size: int
    nbytes: int | None
    count: int = 1


@dataclass(frozen=True)
class Box:
    """One op of a graph, or several that are folded into one.

    Attributes:
        name: of the fx node whose value leaves the box, unique in its graph.
        ops: bare names of what it computes, in order; none where it only sends.
        part: whose it is. What the frozen base would compute as well is the base's, its own collective too, although
            the low-rank product goes along in it.
        path: of the innermost module around all of its ops, "" for the layer itself.
        site: path of the adapted layer that it belongs to, None for what belongs to none or to several.
        outputs: what other boxes read of it, and what nobody reads.
        operands: the parameters and buffers that it reads.
        messages: what it sends in the forward pass, and its gradients in a backward pass if there is one.
        kept: what of its values is kept for the backward pass; None where that is not known.
        nodes: names of all fx nodes in it, views and constants included, and of the parameters and buffers that no box
            before it reads.
    """

    name: str
    ops: tuple[str, ...]
    part: Part
    path: str
    site: str | None
    outputs: tuple[TensorFacts, ...]
    operands: tuple[Operand, ...]
    messages: tuple[Message, ...]
    kept: tuple[TensorFacts, ...] | None
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """A value of the box `source` is read by the box `target`, as it is or as a view."""

    source: str
    target: str


@dataclass(frozen=True)
class GraphDescription:
    """One graph.

    Attributes:
        boxes: in an order in which they can be computed.
        unread: names of the graph's inputs that nothing in it reads.
    """

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    unread: tuple[str, ...]


@dataclass(frozen=True)
class LayerDescription:
    """One layer before and after the passes."""

    title: str
    before: GraphDescription
    after: GraphDescription
