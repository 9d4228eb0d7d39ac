"""Which inputs of a compiled graph hold a DoRA site's parameters and buffers, so that they can be found at run time.

    example graph                                         its `SiteInputs`
    placeholders  weight, x, lora_a, lora_b, ...          stored {"weight": 0, "lora_a": 2, "lora_b": 3, ...}
    %y = dora_linear(%base, x, weight, ...)               constants {"layout": "row", "tp_group": "3", ...}

A site in the body of a checkpoint reads placeholders of the body; they are followed out to the graph's own.

Looks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dora_fx.parameter_cache import CachedSite
from dora_fx.passes.dora_sites import DoRASite, find_dora_sites
from dora_fx.passes.graph_utils import fake_value, referenced_graph_maybe
from dora_fx.site_parameters import CachedParameters, StoredParameters


@dataclass(frozen=True)
class SiteInputs:
    """Where one site's tensors are among a graph's inputs.

    Attributes:
        path: module path, for messages.
        stored, cached: field of `StoredParameters` or `CachedParameters` -> position.
        constants: the other fields of `StoredParameters`.
    """

    path: str
    stored: Mapping[str, int]
    cached: Mapping[str, int]
    constants: Mapping[str, Any]

    def site(self, inputs: Sequence[Any]) -> CachedSite:
        """The site's tensors among the inputs of one call."""
        stored = StoredParameters(**{name: inputs[i] for name, i in self.stored.items()}, **self.constants)
        cached: dict[str, Any] = dict.fromkeys(CachedParameters._fields)
        cached.update((name, inputs[position]) for name, position in self.cached.items())
        return CachedSite(self.path, stored, CachedParameters(**cached))


def find_site_inputs(gm: fx.GraphModule) -> list[SiteInputs]:
    """The inputs of every site of a graph, before it is rewritten, as far as all of them are inputs."""
    found = [site_inputs_maybe(gm, site) for site in find_dora_sites(gm)]
    return [inputs for inputs in found if inputs is not None]


def site_inputs_maybe(gm: fx.GraphModule, site: DoRASite) -> SiteInputs | None:
    """The inputs of `gm` that hold a site's tensors; None if one of those is computed in the graph."""
    operands = site.operands
    stored = {name: operands[name] for name in StoredParameters._fields if name != "dtype"}
    cached = {name: operands[f"cached_{name}"] for name in CachedParameters._fields}
    sources = {}
    for node in (value for value in (*stored.values(), *cached.values()) if isinstance(value, fx.Node)):
        position = input_position_maybe(gm, node)
        if position is None:
            return None
        sources[node] = position
    constants = {name: value for name, value in stored.items() if not isinstance(value, fx.Node)}
    return SiteInputs(
        site.path,
        {name: sources[value] for name, value in stored.items() if isinstance(value, fx.Node)},
        {name: sources[value] for name, value in cached.items() if isinstance(value, fx.Node)},
        constants | {"dtype": fake_value(operands["weight"]).dtype},
    )


def input_position_maybe(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Position among the inputs of `gm` of a node's value; None if it is computed in the graph."""
    source = _outermost_maybe(gm, node)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    return placeholders.index(source) if source in placeholders else None


def _outermost_maybe(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node of `gm` itself whose value a placeholder of a checkpoint's body has; None if there is no such one."""
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
    return node


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
