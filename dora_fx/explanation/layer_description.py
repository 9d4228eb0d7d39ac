"""Describe one layer's graph before and after the passes, for pictures, trees and JSON."""

from __future__ import annotations

from torch import fx

from dora_fx.explanation.flat_graph import FlatGraph
from dora_fx.explanation.graph_boxes import Kept, describe_graph
from dora_fx.explanation.layer_parts import LayerDescription
from dora_fx.explanation.site_roles import SiteRoles


def describe_layer(before: fx.Graph, after: fx.Graph, title: str, *, kept: Kept | None = None) -> LayerDescription:
    """Describe a layer: its ops folded into boxes, their tensors, what they send, and whose they are.

    Nothing runs but fake tensors, and nothing is sent. Call it while the process groups of the graphs are there.

    Args:
        before: the Dynamo graph with a marker for each adapted layer; a copy, since passes edit in place.
        after: the graph that the passes made of it.
        kept: what the compiled graph keeps for the backward pass, see `kept_for_backward`.

    Returns:
        plain values: `json.dumps(dataclasses.asdict(...))` is its JSON.

    Raises:
        RuntimeError: a process group of the graphs is not there any more.
        ValueError: `kept` names a node that `after` has not.
    """
    flat = FlatGraph.of(before)
    roles = SiteRoles.of(flat)
    return LayerDescription(title, describe_graph(flat, roles, None), describe_graph(FlatGraph.of(after), roles, kept))
