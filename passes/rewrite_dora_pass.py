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

Assumes what the finder checked: nothing outside a site uses its base call. Leaves every unmarked linear alone. Where
the finder could not read the base call, its output is taken as it comes, as the marker itself does, and the rest is
the same:

    %y = dora_linear(%base, x, weight, ...)               %y = %base + reduce_from_group(low_rank), scaled

That is exact, but costs what the join saves: a sum over the ranks of its own where the layer has one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch._dynamo.utils import counters

from dora_fx.collectives import REDUCE
from dora_fx.functional import adapted_linear
from dora_fx.passes.dora_sites import DoRASite, UnmatchedDoRASiteError, find_dora_sites
from dora_fx.passes.graph_utils import call_like, erase_nodes, fake_value
from dora_fx.passes.site_inputs import input_position_maybe, site_inputs_maybe
from dora_fx.site_parameters import CachedParameters, CompleteParameters, StoredParameters, complete_parameters
from dora_fx.site_paths import path_of

logger = logging.getLogger(__name__)

Unmatched = Literal["warn", "error"]


def rewrite_dora_pass(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, cached_parameters: bool = True, unmatched: Unmatched = "warn"
) -> fx.GraphModule:
    """Rewrite every DoRA site of the graph and of the subgraphs it calls, in place; returns `gm`.

    Args:
        cached_parameters: read norms and gathered factors from the sites' buffers where `site_inputs_maybe` finds
            them among the inputs; whoever runs the graph refreshes them. Otherwise all are computed in the graph.
        unmatched: what to do about a site whose base call cannot be read.

    Raises:
        UnmatchedDoRASiteError: there is such a site and `unmatched` is "error"; nothing is changed then.
    """
    sites = find_dora_sites(gm)
    if not sites:
        return gm
    _report_unmatched(sites, [_path(gm, site, example_inputs) for site in sites], unmatched)
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
    rewritten = [site.path for site in sites if site.problem is None]
    counters["dora_fx"]["sites_rewritten"] += len(rewritten)
    counters["dora_fx"]["sites_unmatched"] += len(sites) - len(rewritten)
    logger.info("rewrote %d of %d DoRA sites: %s", len(rewritten), len(sites), ", ".join(rewritten))
    return gm


def complete_sites(gm: fx.GraphModule, sites: Sequence[DoRASite], cached_parameters: bool) -> list[CompleteParameters]:
    """Insert the nodes that complete the parameters of one group of sites, in front of everything that uses them."""
    first = sites[0].marker
    anchor = _first_computation(first.graph) if _stores_inputs(sites[0]) else first
    cached = [_cached(site) for site in sites] if _reads_cache(gm, sites[0], cached_parameters) else None
    stored = [_stored(site) for site in sites]
    if cached is None:
        # Nobody keeps the base's norms up to date for a graph that computes the others.
        stored = [parameters._replace(base_norm_sq=None) for parameters in stored]
    complete, _ = call_like(first, complete_parameters, stored, cached, before=anchor)
    return complete


def rewrite_dora_site(site: DoRASite, complete: CompleteParameters) -> fx.Node:
    """Replace one marker, and its base call if that was read, by explicit nodes; returns the node of the output."""
    operands = site.operands
    base_output = operands["base_output"]
    output, _ = call_like(
        site.marker,
        adapted_linear,
        operands["x"],
        _stored(site),
        complete,
        operands["bias"],
        dtype=_dtype(base_output),
        base_output=None if site.problem is None else base_output,
    )
    site.marker.replace_all_uses_with(output)
    erase_nodes([site.marker, *site.base_call])
    return output


def _report_unmatched(sites: Sequence[DoRASite], paths: Sequence[str], unmatched: Unmatched) -> None:
    for site, path in zip(sites, paths, strict=True):
        if site.problem is None:
            continue
        message = f"{path}: DoRA cannot be joined with its base layer: {site.problem}"
        if unmatched == "error":
            raise UnmatchedDoRASiteError(message)
        reduces = site.operands["tp_group"] and _stored(site).table.leave in REDUCE
        cost = " and a collective of the size of its output" if reduces else ""
        _warn_once(
            f"{message}. It runs beside it, which is exact and costs passes over its output{cost}; "
            'options={"unmatched": "error"} makes this an error'
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _path(gm: fx.GraphModule, site: DoRASite, example_inputs: Sequence[Any]) -> str:
    """The site's path, from its parameters where Dynamo recorded no modules: after a graph break."""
    if site.path:
        return site.path
    position = input_position_maybe(gm, site.operands["lora_a"])
    path = "" if position is None else path_of(example_inputs[position])
    return path or "a module without a recorded path"


def _parameters_group(gm: fx.GraphModule, site: DoRASite, cached_parameters: bool) -> object:
    """Equal for sites whose parameters are inputs of the same graph and are completed alike; else the site's own."""
    if not _stores_inputs(site):
        return site.marker
    return site.marker.graph, _reads_cache(gm, site, cached_parameters)


def _reads_cache(gm: fx.GraphModule, site: DoRASite, cached_parameters: bool) -> bool:
    return cached_parameters and site_inputs_maybe(gm, site) is not None


def _stores_inputs(site: DoRASite) -> bool:
    """Whether everything the site stores comes into its graph from outside, as parameters do."""
    values: Sequence[Any] = _stored(site)
    return all(value.op in ("placeholder", "get_attr") for value in values if isinstance(value, fx.Node))


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
