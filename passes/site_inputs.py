"""Find the inputs of a compiled graph that hold a DoRA site's parameters and buffers, for use at run time.

    example graph                                         its `SiteInputs`
    placeholders  weight, x, lora_a, lora_b, ...          stored weight=Input(0), lora_a=Input(2), lora_b=Input(3), ...
    %y = dora_linear(x=x, weight=weight, lora_a=..., ...)

A site in the body of a checkpoint reads placeholders of the body, and each of them stands for a placeholder of the
graph. While passes run, the graph keeps the sites' placeholders as nodes, so any pass may add or drop placeholders of
its own; their positions are taken after the last pass.

Looks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx
from torch.utils._pytree import tree_map

from dora_fx.cache import CachedSite
from dora_fx.function import CachedParameters, StoredParameters
from dora_fx.modules import AdapterTensors
from dora_fx.passes.graph_utils import nodes_of, referenced_graph_maybe

_META = "dora_fx_sites"

ParametersT = TypeVar("ParametersT", StoredParameters, CachedParameters)


@dataclass(frozen=True)
class Input:
    """Stands for the input of a graph at a position."""

    position: int


@dataclass(frozen=True)
class SiteSources:
    """One rewritten site of a graph, or one adapter of a site with several, and where its tensors come from.

    Attributes:
        path: module path, for messages.
        stored, cached: placeholders of the whole graph in place of tensors; None where one is computed in the graph.
    """

    path: str
    tp_group: str
    stored: StoredParameters | None
    cached: CachedParameters | None


@dataclass(frozen=True)
class SiteInputs:
    """The places of the tensors of a site's adapter among a graph's inputs: `Input`s in place of tensors.

    Attributes:
        path: module path, for messages.
        to_detach: positions of parameters that the graph does not read, and whose gradient a leaf takes.
    """

    path: str
    stored: StoredParameters
    cached: CachedParameters
    to_detach: tuple[int, ...]

    @property
    def position_of_scale(self) -> int:
        """The position of the scale's delta, by which the cache knows a site."""
        where: Any = self.cached.delta
        position: int = where.position
        return position

    def site(self, inputs: Sequence[Any]) -> CachedSite:
        """The site's tensors among the inputs of one call."""
        return CachedSite(self.path, _fill(self.stored, inputs), _fill(self.cached, inputs))


def find_sources(gm: fx.GraphModule, adapter: AdapterTensors, path: str) -> SiteSources:
    """Follow the tensors of a site's adapter to the placeholders of `gm`."""
    stored, cached = adapter
    sources: dict[Any, Any] = {node: _outermost_maybe(gm, node) for node in nodes_of((stored, cached))}
    if None in sources.values():
        return SiteSources(path, stored.tp_group, None, None)
    return SiteSources(path, stored.tp_group, _replace_nodes(stored, sources), _replace_nodes(cached, sources))


def keep_sources(gm: fx.GraphModule, sources: Sequence[SiteSources]) -> None:
    """Keep the sites that a pass rewrote with the graph, for `site_inputs_of`."""
    gm.meta[_META] = [*gm.meta.get(_META, ()), *sources]


def site_inputs_of(gm: fx.GraphModule) -> list[SiteInputs]:
    """The inputs of every rewritten site of a graph that reads its buffers, after all passes."""
    positions = {node: Input(index) for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return [
        SiteInputs(
            sources.path,
            _replace_nodes(sources.stored, positions),
            _replace_nodes(sources.cached, positions),
            tuple(positions[node].position for node in _nodes_with_leaves(sources.stored) if not _is_read(node)),
        )
        for sources in gm.meta.get(_META, ())
        if sources.stored is not None and sources.cached is not None
    ]


def _nodes_with_leaves(stored: StoredParameters) -> list[fx.Node]:
    nodes: Any = stored.parameters_with_leaves
    return nodes


def _is_read(node: fx.Node) -> bool:
    """Return whether anything reads a placeholder; a checkpoint that is handed it need not."""
    for user in node.users:
        body = None
        if user.target is torch.ops.higher_order.tag_activation_checkpoint and isinstance(user.args[0], fx.Node):
            body = referenced_graph_maybe(user.args[0])
        if body is None:
            return True
        placeholders = list(body.graph.find_nodes(op="placeholder"))
        operands = user.args[1:]
        if any(_is_read(placeholders[i]) for i, operand in enumerate(operands) if operand is node):
            return True
    return False


def tensor_parallel_groups(gm: fx.GraphModule) -> list[str]:
    """Names of the process groups that the rewritten sites of a graph communicate over, sorted."""
    return sorted({sources.tp_group for sources in gm.meta.get(_META, ())} - {""})


def input_position_maybe(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Position among the inputs of `gm` of a node's value; None if it is computed in the graph."""
    source = _outermost_maybe(gm, node)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    return placeholders.index(source) if source in placeholders else None


def _replace_nodes(parameters: ParametersT, by: Mapping[Any, Any]) -> ParametersT:
    replaced: ParametersT = tree_map(lambda value: by[value] if isinstance(value, fx.Node) else value, parameters)
    return replaced


def _fill(parameters: ParametersT, inputs: Sequence[Any]) -> ParametersT:
    filled: ParametersT = tree_map(lambda value: inputs[value.position] if type(value) is Input else value, parameters)
    return filled


def _outermost_maybe(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The placeholder of `gm` itself whose value a node has; None if there is no such one."""
    while node.graph is not gm.graph:
        caller = _caller_maybe(gm, node.graph)
        if node.op != "placeholder" or caller is None:
            return None
        position = list(node.graph.find_nodes(op="placeholder")).index(node)
        _, *operands = caller.args
        operand = operands[position]
        if not isinstance(operand, fx.Node):
            return None
        node = operand
    return node if node.op == "placeholder" else None


def _caller_maybe(gm: fx.GraphModule, body: fx.Graph) -> fx.Node | None:
    """The one checkpoint that runs a body, in whatever graph."""
    checkpoints = [
        node
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
        if (referenced := referenced_graph_maybe(node.args[0])) is not None and referenced.graph is body
    ]
    return checkpoints[0] if len(checkpoints) == 1 else None
