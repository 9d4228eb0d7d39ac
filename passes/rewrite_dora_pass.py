"""Rewrite each DoRA site into one explicit subgraph.

    before                                                after
    %h = autograd_function_apply(..., x, weight)          %w = gathered_rows_together([lora_a, ...])   once per graph
    %base = getitem(%h, 0)                                %delta = (magnitude - norm) / norm
    %y = dora_linear(%base, x, weight, ...)               %p = linear(x, weight) + low_rank
                                                          %z = reduce_from_group(%p)                   where partial
                                                          %y = %z + %z * %delta

The base product and the low-rank product are both linear in x, so their sum may take the base layer's one
collective: sum_i(W_i x_i) + sum_i(s B A_i x_i) = sum_i(W_i x_i + s B A_i x_i). AOTAutograd derives the backward
from the new forward, where the two input gradients meet in front of one collective for the same reason. What
depends on parameters alone comes first in the graph, for all sites together, and so its gradients take one collective
of each kind. Norms and gathered factors are inputs of the graph, refreshed before it runs (`parameter_cache.py`). For a
site whose parameters are themselves computed in the graph, they are worked out in the graph as well.

Assumes what the finder checked: nothing outside a site uses its base call. Leaves every unmarked linear alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from dora_fx.functional import adapted_linear
from dora_fx.passes.dora_sites import DoRASite, find_dora_sites
from dora_fx.passes.graph_utils import call_like, erase_nodes, fake_value
from dora_fx.passes.site_inputs import site_inputs_maybe
from dora_fx.site_parameters import CachedParameters, CompleteParameters, StoredParameters, complete_parameters

logger = logging.getLogger(__name__)


def rewrite_dora_pass(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, cached_parameters: bool = True
) -> fx.GraphModule:
    """Rewrite every DoRA site of the graph and of the subgraphs it calls, in place; returns `gm`.

    Args:
        cached_parameters: read norms and gathered factors from the sites' buffers where `site_inputs_maybe` finds
            them among the inputs; whoever runs the graph refreshes them. Otherwise all are worked out in the graph.

    Raises:
        UnsupportedDoRASiteError: see `find_dora_sites`; nothing is changed then.
    """
    sites = find_dora_sites(gm)
    if not sites:
        return gm
    groups: dict[object, list[DoRASite]] = {}
    for site in sites:
        groups.setdefault(_parameters_group(gm, site, cached_parameters), []).append(site)
    completed = [
        (site, complete)
        for group in groups.values()
        for site, complete in zip(group, complete_sites(gm, group, cached_parameters), strict=True)
    ]
    for site, complete in completed:
        rewrite_dora_site(site, complete)
    for module in {site.marker.graph.owning_module for site in sites} | {gm}:
        assert module is not None
        module.graph.lint()
        module.recompile()
    counters["dora_fx"]["sites_rewritten"] += len(sites)
    logger.info("rewrote %d DoRA sites: %s", len(sites), ", ".join(site.path for site in sites))
    return gm


def complete_sites(gm: fx.GraphModule, sites: Sequence[DoRASite], cached_parameters: bool) -> list[CompleteParameters]:
    """Insert the nodes that complete the parameters of one group of sites, in front of everything that uses them."""
    first = sites[0].marker
    anchor = _first_computation(first.graph) if _stores_inputs(sites[0]) else first
    cached = [_cached(site) for site in sites] if _reads_cache(gm, sites[0], cached_parameters) else None
    complete, _ = call_like(first, complete_parameters, [_stored(site) for site in sites], cached, before=anchor)
    return complete


def rewrite_dora_site(site: DoRASite, complete: CompleteParameters) -> fx.Node:
    """Replace one marker and its base call by explicit nodes; returns the node of the output."""
    operands = site.operands
    output, _ = call_like(
        site.marker,
        adapted_linear,
        operands["x"],
        _stored(site),
        complete,
        operands["bias"],
        dtype=_dtype(operands["base_output"]),
    )
    site.marker.replace_all_uses_with(output)
    erase_nodes([site.marker, *site.base_call])
    return output


def _parameters_group(gm: fx.GraphModule, site: DoRASite, cached_parameters: bool) -> object:
    """Equal for sites whose parameters are inputs of the same graph and are completed alike; else the site's own."""
    if not _stores_inputs(site):
        return site.marker
    return site.marker.graph, _reads_cache(gm, site, cached_parameters)


def _reads_cache(gm: fx.GraphModule, site: DoRASite, cached_parameters: bool) -> bool:
    return cached_parameters and site_inputs_maybe(gm, site) is not None


def _stores_inputs(site: DoRASite) -> bool:
    """Whether everything the site stores comes into its graph from outside, as parameters do."""
    return all(value.op in ("placeholder", "get_attr") for value in _stored(site) if isinstance(value, fx.Node))


def _first_computation(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))


def _stored(site: DoRASite) -> StoredParameters:
    operands = site.operands
    names = [name for name in StoredParameters._fields if name != "dtype"]
    return StoredParameters(**{name: operands[name] for name in names}, dtype=_dtype(operands["weight"]))


def _cached(site: DoRASite) -> CachedParameters:
    operands = site.operands
    return CachedParameters(**{name: operands[f"cached_{name}"] for name in CachedParameters._fields})


def _dtype(node: fx.Node) -> torch.dtype:
    return fake_value(node).dtype
