"""Folds the nodes of one graph into boxes.

Nodes of the frozen base that the passes leave alone are folded into a box for each module without an adapted layer
inside it, as far as no path leaves the box and comes back. What belongs to an adapted layer, and what sends, has boxes
of its own; only a product by a single number joins the box whose value it takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import fx

from dora_fx.explanation.flat_graph import FlatGraph
from dora_fx.explanation.layer_parts import Box, Edge, GraphDescription, Message, Operand, Part, TensorFacts
from dora_fx.explanation.node_messages import messages_of
from dora_fx.explanation.node_values import (
    computed_ops,
    facts_of,
    is_number,
    module_tensor_name_maybe,
    tensors_of,
    value_of,
)
from dora_fx.explanation.site_roles import SiteRoles, common_path

Kept = Mapping[str, tuple[TensorFacts, ...]]


@dataclass(frozen=True)
class _Op:
    """A node that computes, with what decides where it goes; `fold_key` is None for one that stays alone."""

    node: fx.Node
    part: Part
    site: str | None
    path: str
    messages: tuple[Message, ...]
    fold_key: str | None


def describe_graph(flat: FlatGraph, roles: SiteRoles, kept: Kept | None) -> GraphDescription:
    """Fold a graph into boxes.

    Args:
        kept: what is kept for the backward pass, by the names of the nodes that compute it; None if that is not known.

    Raises:
        ValueError: `kept` names a node that the graph has not.
    """
    ops = _classified(flat, roles)
    clusters = _clusters(flat, ops)
    return _Boxes(flat, roles, ops, clusters, kept).described()


def _classified(flat: FlatGraph, roles: SiteRoles) -> dict[fx.Node, _Op]:
    messages = {node: messages_of(node) for node in flat.computing}
    parts = roles.parts(flat, {node for node, sent in messages.items() if sent})
    ops = {}
    for node in flat.computing:
        path, site = roles.path_of(node), roles.site_maybe(flat, node)
        folds = parts[node] == "base" and site is None and not messages[node]
        key = roles.outermost_without_site(path) if folds else None
        ops[node] = _Op(node, parts[node], site, path, messages[node], key)
    return ops


def _clusters(flat: FlatGraph, ops: Mapping[fx.Node, _Op]) -> list[list[fx.Node]]:
    """Return the nodes of each box, in graph order."""
    clusters = {node: number for number, node in enumerate(ops)}
    for node in ops:
        scaled = _scaled_maybe(flat, ops, node)
        if scaled is not None:
            clusters[node] = clusters[scaled]
    by_key = defaultdict(list)
    for node, op in ops.items():
        if op.fold_key is not None:
            by_key[op.fold_key].append(node)
    for nodes in by_key.values():
        for first, second in combinations(nodes, 2):
            _join_if_convex(flat, clusters, clusters[first], clusters[second])
    members = defaultdict(list)
    for node, cluster in clusters.items():
        members[cluster].append(node)
    return list(members.values())


def _scaled_maybe(flat: FlatGraph, ops: Mapping[fx.Node, _Op], node: fx.Node) -> fx.Node | None:
    """Return the node whose value, which nothing else reads, `node` multiplies by a single number."""
    if computed_ops(node) != ("mul",):
        return None
    values = [operand for operand in flat.operands[node] if not is_number(operand)]
    if len(values) != 1 or values[0] not in ops or ops[values[0]].messages or values[0] in flat.outputs:
        return None
    readers = [other for other in ops if values[0] in flat.operands[other]]
    same = ops[values[0]].part == ops[node].part and ops[values[0]].site == ops[node].site
    return values[0] if readers == [node] and same else None


def _join_if_convex(flat: FlatGraph, clusters: dict[fx.Node, int], first: int, second: int) -> None:
    """Join two clusters unless a path from one to the other leads through a third."""
    if first == second:
        return
    readers = defaultdict(set)
    for node, operands in flat.operands.items():
        for operand in operands:
            if operand in clusters and clusters[operand] != clusters[node]:
                readers[clusters[operand]].add(clusters[node])
    for start, end in ((first, second), (second, first)):
        if end in _reached(readers, readers[start] - {end}):
            return
    for node, cluster in clusters.items():
        if cluster == second:
            clusters[node] = first


def _reached(readers: Mapping[int, set[int]], starts: Iterable[int]) -> set[int]:
    reached, waiting = set(), list(starts)
    while waiting:
        cluster = waiting.pop()
        if cluster not in reached:
            reached.add(cluster)
            waiting.extend(readers.get(cluster, ()))
    return reached


class _Boxes:
    """The boxes and edges of one graph, whose clusters are known."""

    def __init__(
        self,
        flat: FlatGraph,
        roles: SiteRoles,
        ops: Mapping[fx.Node, _Op],
        clusters: Sequence[list[fx.Node]],
        kept: Kept | None,
    ) -> None:
        self.flat, self.roles, self.ops, self.kept = flat, roles, ops, kept
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, operands in flat.operands.items():
            for operand in operands:
                self.readers[operand].append(node)
        self.clusters = _in_order(flat, clusters)
        self.box_of = {node: flat.names[nodes[-1]] for nodes in self.clusters for node in nodes}
        self.tensors_of_modules = {
            node
            for node in flat.inputs
            if roles.role_maybe(node) or module_tensor_name_maybe(node) or node.op == "get_attr"
        }
        self.first_reader: dict[fx.Node, str] = {}
        for nodes in self.clusters:
            for source in (source for node in nodes for source in flat.operands[node]):
                self.first_reader.setdefault(source, self.box_of[nodes[0]])

    def described(self) -> GraphDescription:
        read = {operand for operands in self.flat.operands.values() for operand in operands} | {*self.flat.outputs}
        inputs = [node for node in self.flat.inputs if node in read and node not in self.tensors_of_modules]
        self.box_of.update({node: self.flat.names[node] for node in inputs})
        boxes = [*map(self._input, inputs), *map(self._box, self.clusters), self._output()]
        edges = [Edge(self.box_of[source], self.box_of[node]) for node, source in self._arrows()]
        edges += [Edge(self.box_of[node], self.flat.output) for node in self.flat.outputs if node in self.box_of]
        if self.kept is not None and (unknown := {*self.kept} - {name for box in boxes for name in box.nodes}):
            raise ValueError(f"kept: found {sorted(unknown)}, expected names of nodes of the graph")
        unread = [self.flat.names[node] for node in self.flat.inputs if node not in read]
        return GraphDescription(tuple(boxes), tuple(dict.fromkeys(edges)), tuple(unread))

    def _arrows(self) -> Iterable[tuple[fx.Node, fx.Node]]:
        for nodes in self.clusters:
            for node in nodes:
                for source in self.flat.operands[node]:
                    if source in self.box_of and self.box_of[source] != self.box_of[node]:
                        yield node, source

    def _box(self, nodes: list[fx.Node]) -> Box:
        ops = [self.ops[node] for node in nodes]
        sites = {op.site for op in ops}
        part: Part = "dora" if any(op.part == "dora" for op in ops) else "base"
        names = self._names([*nodes, *self._first_read_by(nodes)])
        kept = None if self.kept is None else tuple(facts for name in names for facts in self.kept.get(name, ()))
        return Box(
            name=self.flat.names[nodes[-1]],
            ops=tuple(name for node in nodes for name in computed_ops(node)),
            part=part,
            path=common_path([op.path for op in ops]),
            site=sites.pop() if len(sites) == 1 else None,
            outputs=tuple(facts for node in nodes if self._leaves(node, nodes) for facts in tensors_of(node)),
            operands=self._operands(nodes),
            messages=tuple(message for op in ops for message in op.messages),
            kept=kept,
            nodes=names,
        )

    def _first_read_by(self, nodes: Sequence[fx.Node]) -> Iterable[fx.Node]:
        """Yield the parameters and buffers that no box before reads."""
        for source in dict.fromkeys(source for node in nodes for source in self.flat.operands[node]):
            if source in self.tensors_of_modules and self.first_reader[source] == self.box_of[nodes[0]]:
                yield source

    def _leaves(self, node: fx.Node, nodes: Collection[fx.Node]) -> bool:
        readers = self.readers[node]
        return node in self.flat.outputs or not readers or any(reader not in nodes for reader in readers)

    def _operands(self, nodes: Sequence[fx.Node]) -> tuple[Operand, ...]:
        read = dict.fromkeys(source for node in nodes for source in self.flat.operands[node])
        site = self.ops[nodes[0]].site
        return tuple(
            Operand(self.roles.name_of(source, site), facts_of(value_of(source)))
            for source in read
            if source in self.tensors_of_modules
        )

    def _names(self, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        return tuple(self.flat.names[folded] for node in nodes for folded in (node, *self.flat.folded[node]))

    def _input(self, node: fx.Node) -> Box:
        names = self._names([node])
        return Box(self.flat.names[node], (), "input", "", None, tensors_of(node), (), (), None, names)

    def _output(self) -> Box:
        outputs = tuple(facts for node in self.flat.outputs for facts in tensors_of(node))
        name = self.flat.output
        return Box(name, (), "output", "", None, outputs, (), (), None, (name,))


def _in_order(flat: FlatGraph, clusters: Sequence[list[fx.Node]]) -> list[list[fx.Node]]:
    """Return the clusters in an order in which they can be computed, near to that of their first nodes."""
    of = {node: number for number, nodes in enumerate(clusters) for node in nodes}
    needs = [
        {of[source] for node in nodes for source in flat.operands[node] if source in of} - {number}
        for number, nodes in enumerate(clusters)
    ]
    ordered: list[int] = []
    waiting = list(range(len(clusters)))
    while waiting:
        ready = next(number for number in waiting if needs[number] <= {*ordered})
        waiting.remove(ready)
        ordered.append(ready)
    return [clusters[number] for number in ordered]
