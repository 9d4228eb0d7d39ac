"""Rewrite each DoRA site into one explicit subgraph.

    before                                                after
    %h = autograd_function_apply(..., x, weight)          %w = substitute_gathered_rows([lora_a, ...])   once per graph
    %base = getitem(%h, 0)                                %p = linear(x, weight) + low_rank
    %y = dora_linear(base_output=%base, x=x, ...)         %z = reduce_from_group(%p)                   where partial
                                                          %y = scale_rows(%z, bias, magnitude, scale)    z + delta z

The base product and the low-rank product are both linear in x, so their sum may take the base layer's one
collective: sum_i(W_i x_i) + sum_i(s B A_i x_i) = sum_i(W_i x_i + s B A_i x_i). AOTAutograd derives the backward pass
from the new forward pass, where the two gradients of the input meet in front of one collective for the same reason.
Whatever depends on parameters alone is put in front of the graph, for all sites together, so their gradients need one
collective of each kind. Norms and gathered factors are inputs of the graph, and refreshed before it runs
(`parameter_cache.py`). A site whose parameters are themselves computed in the graph has its norms computed there too.

Assumes what the finder checked: nothing outside a site uses its base call. Leaves alone every linear without a marker.
Where the finder could not read the base call, the rewrite takes its output as it is, as the marker itself does:

    %y = dora_linear(base_output=%base, x=x, ...)         %y = scale_rows(%base + reduce_from_group(low_rank), ...)

The result is the same, and costs what the join saves where the layer has a collective: the low-rank product has one of
its own.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import fx
from torch._dynamo.utils import counters

from dora_fx.function import SiteOperands, adapted_linear, complete_parameters
from dora_fx.modules import operands_of_call, path_of
from dora_fx.passes.dora_sites import DoRASite, UnmatchedDoRASiteError, find_dora_sites
from dora_fx.passes.graph_utils import call_like, erase_nodes, fake_value, nodes_of
from dora_fx.passes.site_inputs import find_sources, input_position_maybe, keep_sources

logger = logging.getLogger(__name__)

Unmatched = Literal["warn", "error"]


def rewrite_dora_pass(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, cached_parameters: bool = True, unmatched: Unmatched = "warn"
) -> fx.GraphModule:
    """Rewrite every DoRA site of the graph and of the subgraphs it calls, in place; returns `gm`.

    Args:
        cached_parameters: read norms and gathered factors from the sites' buffers where these are inputs of the graph;
            the caller of the graph refreshes them, see `site_inputs.py`. Otherwise all are computed in the graph.
        unmatched: what to do about a site whose base call cannot be read.

    Raises:
        UnmatchedDoRASiteError: there is such a site and `unmatched` is "error"; nothing is changed then.
    """
    sites = find_dora_sites(gm)
    if not sites:
        return gm
    paths = [_path(gm, site, example_inputs) for site in sites]
    _report_unmatched(sites, paths, unmatched)
    sources = [
        [find_sources(gm, adapter, path) for adapter in site.marked.adapters]
        for site, path in zip(sites, paths, strict=True)
    ]
    if not cached_parameters:
        sources = [[replace(each, stored=None, cached=None) for each in of_site] for of_site in sources]
    groups: dict[tuple[bool, object], list[DoRASite]] = {}
    for site, of_site in zip(sites, sources, strict=True):
        # The parameters of sites are completed together where they are inputs of one graph.
        together = site.marker.graph if _stores_inputs(site) else site.marker
        reads_cache = all(each.cached is not None for each in of_site)
        if not reads_cache:
            of_site[:] = [replace(each, stored=None, cached=None) for each in of_site]
        groups.setdefault((reads_cache, together), []).append(site)
    completed = [
        (site, operands)
        for (reads_cache, _), group in groups.items()
        for site, operands in zip(group, complete_sites(group, reads_cache=reads_cache), strict=True)
    ]
    for site, operands in completed:
        rewrite_dora_site(site, operands)
    keep_sources(gm, [each for of_site in sources for each in of_site])
    for module in {site.marker.graph.owning_module for site in sites} | {gm}:
        assert module is not None
        module.graph.lint()
        module.recompile()
    _report_rewritten(sites, paths)
    return gm


def complete_sites(sites: Sequence[DoRASite], *, reads_cache: bool) -> list[list[SiteOperands]]:
    """Insert the nodes that complete the parameters of one group of sites, in front of everything that uses them.

    Returns:
        the operands of each site's adapters.
    """
    first = sites[0].marker
    anchor = _first_computation(first.graph) if _stores_inputs(sites[0]) else first
    adapters = [site.marked.adapters for site in sites]
    cached = [each.cached for of_site in adapters for each in of_site] if reads_cache else None
    stored = [each.stored for of_site in adapters for each in of_site]
    if cached is None:
        # Nobody keeps the base's norms up to date for a graph that computes the others.
        stored = [parameters._replace(base_norm_sq=None) for parameters in stored]
    operands, _ = call_like(first, complete_parameters, stored, cached, before=anchor)
    remaining = iter(operands)
    return [list(itertools.islice(remaining, len(of_site))) for of_site in adapters]


def rewrite_dora_site(site: DoRASite, operands: Sequence[SiteOperands]) -> fx.Node:
    """Replace one marker, and its base call if that was read, by explicit nodes; returns the node of the output."""
    marked: Any = site.marked
    in_call, _ = call_like(site.marker, operands_of_call, marked, operands)
    output, _ = call_like(
        site.marker,
        adapted_linear,
        marked.x,
        marked.stored,
        in_call,
        marked.bias,
        dtype=fake_value(site.marker).dtype,
        base_output=marked.base_output if site.keeps_base else None,
        input_norm=marked.input_norm,
    )
    site.marker.replace_all_uses_with(output)
    erase_nodes([site.marker, *site.base_call])
    return output


def _report_rewritten(sites: Sequence[DoRASite], paths: Sequence[str]) -> None:
    beside = [path for site, path in zip(sites, paths, strict=True) if site.problem is not None]
    counters["dora_fx"]["sites_rewritten"] += len(sites) - len(beside)
    counters["dora_fx"]["sites_unmatched"] += len(beside)
    apart = f"; {len(beside)} of them beside their base layers ({', '.join(beside)})" if beside else ""
    logger.info("DoRA sites rewritten: %d (%s)%s", len(sites), ", ".join(paths), apart)


def _report_unmatched(sites: Sequence[DoRASite], paths: Sequence[str], unmatched: Unmatched) -> None:
    for site, path in zip(sites, paths, strict=True):
        if site.problem is None:
            continue
        message = f"{path}: DoRA cannot be joined with its base layer: {site.problem}"
        if unmatched == "error":
            raise UnmatchedDoRASiteError(message)
        cost = " and a collective of the size of its output" if site.marked.stored.reduces else ""
        _warn_once(
            f"{message}. It runs beside it, which is exact and costs passes over its output{cost}; "
            'options={"unmatched": "error"} makes this an error'
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _path(gm: fx.GraphModule, site: DoRASite, example_inputs: Sequence[Any]) -> str:
    """The site's path; its parameters know it where Dynamo recorded no modules, as after a graph break."""
    if site.path:
        return site.path
    lora_a: Any = site.marked.stored.lora_a
    position = input_position_maybe(gm, lora_a)
    path = "" if position is None else path_of(example_inputs[position])
    return path or "a module without a recorded path"


def _stores_inputs(site: DoRASite) -> bool:
    """Return whether everything the site stores comes into its graph from outside, as parameters do."""
    stored = [each.stored for each in site.marked.adapters]
    return all(value.op in ("placeholder", "get_attr") for value in nodes_of(stored))


def _first_computation(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
