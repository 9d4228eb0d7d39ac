"""The marker: one node per DoRA site in a Dynamo graph, and its eager meaning.

While Dynamo traces, `DoRALinear` calls the base layer as it is and then marks its output. Dynamo keeps the marker as a
single node, which the `dora_fx` backend rewrites. Any other backend traces into it, and eager code runs what it stands
for, so the function is the same whoever compiles; nothing is dropped where the rewrite does not run.

A node takes tensors and constants one by one: `mark` packs a site into them, and `unpack` reads them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dora_fx.cache import CachedSite, is_traced, refresh
from dora_fx.function import (
    CachedParameters,
    CompleteParameters,
    InputNorm,
    StoredParameters,
    adapted_linear,
    complete_parameters,
)
from dora_fx.modules.site_paths import path_of


class MarkedSite(NamedTuple):
    """One call of an adapted layer; in a graph the tensors are nodes.

    Attributes:
        base_output: what the base layer returned for `x`, with `bias` where the layer adds it itself. None to have its
            product computed here, and joined with the low-rank product before the layer's one collective.
        x: the layer's input, see `formula.adapted_linear`.
        bias: the bias that the base layer adds itself, None if it returns it or has none.
        stored: the site's parameters.
        cached: the site's buffers. The dora_fx backend refreshes them before it runs a graph, and eager code in `mark`.
        input_norm: the norm that the layer applies to x itself, None without one.
    """

    base_output: torch.Tensor | None
    x: torch.Tensor
    bias: torch.Tensor | None
    stored: StoredParameters
    cached: CachedParameters
    input_norm: InputNorm | None


def mark(site: MarkedSite) -> torch.Tensor:
    """Turn the base layer's output into the DoRA layer's, as one node where Dynamo traces.

    Whatever else records operations gets those that compute the norms: a cached one would be a constant of the record.
    """
    if torch.compiler.is_compiling() or is_traced(site.x, site.stored.lora_a):
        return dora_linear(site.base_output, site.x, site.bias, *site.stored, *site.cached, *(site.input_norm or ()))
    refresh([CachedSite(path_of(site.stored.lora_a), site.stored, site.cached)])
    [complete] = complete_parameters([site.stored], [site.cached])
    return _adapted(site, complete)


def unpack(arguments: Sequence[Any]) -> MarkedSite:
    """The site that `mark` packed into a marker's arguments."""
    base_output, x, bias, *fields = arguments
    num_stored = len(StoredParameters._fields)
    stored, fields = fields[:num_stored], fields[num_stored:]
    cached, norm = fields[: len(CachedParameters._fields)], fields[len(CachedParameters._fields) :]
    return MarkedSite(
        base_output,
        x,
        bias,
        StoredParameters(*stored),
        CachedParameters(*cached),
        InputNorm(*norm) if norm else None,
    )


@torch.compiler.allow_in_graph
def dora_linear(*arguments: Any) -> torch.Tensor:
    """The marker; see `mark`.

    Where no backend rewrites it, nobody refreshes buffers in front of its graph, and to write into a graph's inputs
    would break what has saved them. So it reads parameters alone.
    """
    site = unpack(arguments)
    [complete] = complete_parameters([site.stored._replace(base_norm_sq=None)])
    return _adapted(site, complete)


def _adapted(site: MarkedSite, complete: CompleteParameters) -> torch.Tensor:
    dtype = site.stored.dtype if site.base_output is None else site.base_output.dtype
    return adapted_linear(
        site.x,
        site.stored,
        complete,
        site.bias,
        dtype=dtype,
        base_output=site.base_output,
        input_norm=site.input_norm,
    )
