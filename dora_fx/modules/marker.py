"""The marker: one node per DoRA site in a Dynamo graph, and its eager meaning.

While Dynamo traces, `DoRALinear` calls the base layer as it is and then marks its output. Dynamo keeps the marker as a
single node, which the `dora_fx` backend rewrites. Any other backend traces into it, and eager code runs what it stands
for, so every compiler computes the same, and nothing is dropped where the rewrite does not run.

A node names each tensor and constant of its site, and leaves out those that the site lacks: `mark` writes the names,
and `read_site` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dora_fx.cache import CachedSite, are_covered, is_traced, refresh
from dora_fx.function import (
    CachedParameters,
    InputNorm,
    QuantisedWeight,
    SiteOperands,
    StoredParameters,
    adapted_linear,
    complete_parameters,
)
from dora_fx.modules.site_paths import path_of

# What precedes the names of a record's fields in a marker.
_STORED, _CACHED, _NORM = "", "cached_", "norm_"


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
        return dora_linear(**_keywords(site))
    if not are_covered([site.cached.delta]):
        refresh([CachedSite(path_of(site.stored.lora_a), site.stored, site.cached)])
    [operands] = complete_parameters([site.stored], [site.cached])
    return _adapted(site, operands)


def _keywords(site: MarkedSite) -> dict[str, Any]:
    """What a site has, by the names in a marker; None or an empty name stands for what it lacks."""
    operands: dict[str, Any] = {"base_output": site.base_output, "x": site.x, "bias": site.bias}
    for prefix, record in ((_STORED, site.stored), (_CACHED, site.cached), (_NORM, site.input_norm)):
        if record is not None:
            operands.update({prefix + name: value for name, value in zip(record._fields, record, strict=True)})
    weight = site.stored.weight
    if isinstance(weight, QuantisedWeight):
        # A graph holds tensors and constants, in tuples, and no records.
        operands["weight"], operands["weight_format"] = weight.tensors, tuple(weight[1:])
    return {
        name: value
        for name, value in operands.items()
        if value is not None and not (isinstance(value, str) and not value)
    }


def read_site(keywords: Mapping[str, Any]) -> MarkedSite:
    """The site that `mark` wrote into a marker's keywords."""

    def record(record_type: Any, prefix: str) -> Any:
        defaults = record_type._field_defaults
        return record_type(*(keywords.get(prefix + name, defaults.get(name)) for name in record_type._fields))

    stored = record(StoredParameters, _STORED)
    if "weight_format" in keywords:
        stored = stored._replace(weight=QuantisedWeight(tuple(keywords["weight"]), *keywords["weight_format"]))
    return MarkedSite(
        base_output=keywords.get("base_output"),
        x=keywords["x"],
        bias=keywords.get("bias"),
        stored=stored,
        cached=record(CachedParameters, _CACHED),
        input_norm=record(InputNorm, _NORM) if f"{_NORM}weight" in keywords else None,
    )


@torch.compiler.allow_in_graph
def dora_linear(**keywords: Any) -> torch.Tensor:
    """The marker; see `mark`.

    Where no backend rewrites it, nobody refreshes buffers in front of its graph, and to write into a graph's inputs
    would break what has saved them. So it reads parameters alone.
    """
    site = read_site(keywords)
    [operands] = complete_parameters([site.stored._replace(base_norm_sq=None)])
    return _adapted(site, operands)


def _adapted(site: MarkedSite, operands: SiteOperands) -> torch.Tensor:
    dtype = site.stored.dtype if site.base_output is None else site.base_output.dtype
    return adapted_linear(
        site.x,
        site.stored,
        operands,
        site.bias,
        dtype=dtype,
        base_output=site.base_output,
        input_norm=site.input_norm,
    )
