"""A graph as a list of nodes that compute, with the bodies of checkpoints in place of their calls.

Views, parts of tuples and conversions to a tensor's own dtype pass a value on; allocations have none. All of them, and
whatever returns no tensor, are folded into a node that computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from dora_fx.explanation.node_values import is_allocation, is_tensor, tensors_of, viewed_maybe, writes_in_place
from dora_fx.passes import op_name, referenced_graph_maybe


@dataclass
class FlatGraph:
    """What one walk over a graph found.

    Attributes:
        names: of every node, with the names of the bodies around it; unique.
        computing: the nodes that compute tensors, in graph order.
        operands: of each of them, the nodes whose values it reads, without views: nodes that compute, and inputs.
        folded: of each node that computes or is an input, the other nodes that are folded into it.
        inputs: placeholders and attributes with a tensor, of the outermost graph.
        output: name of the node that returns.
        outputs: the nodes whose values the graph returns.
    """

    names: dict[fx.Node, str] = field(default_factory=dict)
    computing: list[fx.Node] = field(default_factory=list)
    operands: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    folded: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    output: str = ""
    outputs: list[fx.Node] = field(default_factory=list)
    _stands_for: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _body_outputs: dict[fx.Node, list[fx.Node | None]] = field(default_factory=dict)
    _written_by: dict[fx.Node, fx.Node] = field(default_factory=dict)
    # Nodes to be folded into the next one that computes.
    _waiting: list[fx.Node] = field(default_factory=list)

    @classmethod
    def of(cls, graph: fx.Graph) -> FlatGraph:
        """Walk over a graph."""
        flat = cls()
        flat._walk(graph, "")
        for last in (flat.computing or flat.inputs)[-1:]:
            flat.folded[last] += flat._waiting
        output = graph.find_nodes(op="output")[0]
        flat.output = output.name
        flat.outputs = [node for node in flat._sources(output) if not is_allocation(node)]
        return flat

    def _walk(self, graph: fx.Graph, prefix: str) -> None:
        for node in graph.nodes:
            self.names[node] = prefix + node.name
            if node.op == "output":
                continue
            body = _checkpoint_body_maybe(node)
            if body is not None:
                self._inline(node, body)
            elif node not in self._stands_for:
                self._take(node)

    def _inline(self, call: fx.Node, body: fx.GraphModule) -> None:
        """Walk over a checkpoint's body, whose placeholders stand for the call's operands."""
        placeholders = body.graph.find_nodes(op="placeholder")
        for placeholder, operand in zip(placeholders, call.args[1:], strict=True):
            if isinstance(operand, fx.Node):
                self._stands_for[placeholder] = self.source(operand)
        self._walk(body.graph, f"{self.names[call.args[0]]}.")  # type: ignore[index]
        returned = body.graph.find_nodes(op="output")[0].args[0]
        parts = returned if isinstance(returned, (tuple, list)) else [returned]
        self._body_outputs[call] = [self.source(part) if isinstance(part, fx.Node) else None for part in parts]
        self._fold(call)

    def _take(self, node: fx.Node) -> None:
        sources = self._sources(node)
        viewed = viewed_maybe(node)
        if viewed in self._body_outputs and op_name(node) == "getitem":
            of_body = self._body_outputs[viewed][node.args[1]]  # type: ignore[index]
            if of_body is not None:
                self._stands_for[node] = of_body
            self._fold(node)
        elif viewed is not None:
            self._stands_for[node] = self.source(viewed)
            self._fold(node)
        elif node.op in ("placeholder", "get_attr") and is_tensor(node):
            self.inputs.append(node)
            self.folded[node] = []
        elif is_allocation(node) or not tensors_of(node):
            self._fold(node)
        else:
            self._compute(node, [source for source in sources if source in self.folded])

    def _compute(self, node: fx.Node, operands: list[fx.Node]) -> None:
        self.computing.append(node)
        self.operands[node] = operands
        self.folded[node], self._waiting = self._waiting, []
        if writes_in_place(node) and node.all_input_nodes:
            # Whoever reads the tensor, or a view of it, from here on reads what was written.
            self._written_by[self.source(node.all_input_nodes[0])] = node

    def _fold(self, node: fx.Node) -> None:
        """Fold a node into the one whose value it passes on, or into the next one that computes."""
        into = self.source(node)
        while into not in self.folded and into.all_input_nodes:
            into = self.source(into.all_input_nodes[0])
        self.folded.get(into, self._waiting).append(node)

    def source(self, node: fx.Node) -> fx.Node:
        """Return the node that computed a node's value, or the input that it is."""
        node = self._stands_for.get(node, node)
        while node in self._written_by:
            node = self._written_by[node]
        return node

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return list(dict.fromkeys(self.source(operand) for operand in _read_by(node, self._body_outputs)))


def _read_by(node: fx.Node, body_outputs: dict[fx.Node, list[fx.Node | None]]) -> Iterator[fx.Node]:
    for operand in node.all_input_nodes:
        if operand in body_outputs:
            yield from (part for part in body_outputs[operand] if part is not None)
        else:
            yield operand


def _checkpoint_body_maybe(node: fx.Node) -> fx.GraphModule | None:
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    body = node.args[0]
    return referenced_graph_maybe(body) if isinstance(body, fx.Node) else None
