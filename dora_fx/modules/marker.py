"""The marker: one node per DoRA site in a Dynamo graph, and its eager meaning.

While Dynamo traces, `DoRALinear` calls the base layer as it is and then marks its output. Dynamo keeps the marker as a
single node, which the `dora_fx` backend rewrites. Any other backend traces into it, and eager code runs what it stands
for, so every compiler computes the same, and nothing is dropped where the rewrite does not run.

A node names each tensor and constant of its site, and leaves out those that the site lacks: `mark` writes the names,
and `read_site` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dora_fx.cache import CachedSite, are_covered, is_traced, refresh
from dora_fx.function import (
    CachedParameters,
    InputNorm,
    MixedOperands,
    QuantisedWeight,
    Samples,
    SiteOperands,
    StoredParameters,
    adapted_linear,
    complete_parameters,
    mix,
)
from dora_fx.modules.site_paths import path_of

# What precedes the names of a record's fields in a marker, those of a further adapter's after its `_ADAPTER`.
_STORED, _CACHED, _NORM, _SAMPLES, _ADAPTER = "", "cached_", "norm_", "samples_", "adapter{}_"
# The name of all of a quantised weight but its tensors, which are under that of the weight.
_FORMAT = "weight_format"


class AdapterTensors(NamedTuple):
    """What one call reads of one adapter; see `MarkedSite`."""

    stored: StoredParameters
    cached: CachedParameters


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
        others: the adapters after the first in a mixed call, whose `stored` and `cached` are of the first one.
        samples: which sample or token has which of them, None in a call of one adapter.
    """

    base_output: torch.Tensor | None
    x: torch.Tensor
    bias: torch.Tensor | None
    stored: StoredParameters
    cached: CachedParameters
    input_norm: InputNorm | None
    others: tuple[AdapterTensors, ...] = ()
    samples: Samples | None = None

    @property
    def adapters(self) -> tuple[AdapterTensors, ...]:
        """What the call reads of each of its adapters."""
        return (AdapterTensors(self.stored, self.cached), *self.others)


def mark(site: MarkedSite) -> torch.Tensor:
    """Turn the base layer's output into the DoRA layer's, as one node where Dynamo traces.

    Whatever else records operations gets those that compute the norms: a cached one would be a constant of the record.
    """
    if torch.compiler.is_compiling() or is_traced(site.x, site.stored.lora_a):
        return dora_linear(**_keywords(site))
    adapters = site.adapters
    if not are_covered(each.cached.delta for each in adapters):
        path = path_of(site.stored.lora_a)
        refresh([CachedSite(path, each.stored, each.cached) for each in adapters])
    return _adapted(site, complete_parameters([each.stored for each in adapters], [each.cached for each in adapters]))


def _keywords(site: MarkedSite) -> dict[str, Any]:
    """What a site has, by the names in a marker; None or an empty name stands for what it lacks."""
    operands: dict[str, Any] = {"base_output": site.base_output, "x": site.x, "bias": site.bias}
    records: list[tuple[str, Any]] = []
    for number, each in enumerate(site.adapters):
        records += [(_of(number) + _STORED, each.stored), (_of(number) + _CACHED, each.cached)]
    records += [(_NORM, site.input_norm), (_SAMPLES, site.samples)]
    for prefix, record in records:
        if record is not None:
            operands.update({prefix + name: value for name, value in zip(record._fields, record, strict=True)})
    for number, each in enumerate(site.adapters):
        weight, prefix = each.stored.weight, _of(number) + _STORED
        if isinstance(weight, QuantisedWeight):
            # A graph holds tensors and constants, in tuples, and no records.
            operands[f"{prefix}weight"], operands[prefix + _FORMAT] = weight.tensors, tuple(weight[1:])
    return {
        name: value
        for name, value in operands.items()
        if value is not None and not (isinstance(value, str) and not value)
    }


def _of(number: int) -> str:
    """What precedes the names of an adapter's records; nothing for the first, so most markers have plain names."""
    return _ADAPTER.format(number) if number else ""


def read_site(keywords: Mapping[str, Any]) -> MarkedSite:
    """The site that `mark` wrote into a marker's keywords."""

    def record(record_type: Any, prefix: str) -> Any:
        defaults = record_type._field_defaults
        return record_type(*(keywords.get(prefix + name, defaults.get(name)) for name in record_type._fields))

    def adapter(number: int) -> AdapterTensors:
        prefix = _of(number)
        stored = record(StoredParameters, prefix + _STORED)
        if prefix + _FORMAT in keywords:
            stored = stored._replace(weight=QuantisedWeight(tuple(stored.weight), *keywords[prefix + _FORMAT]))
        return AdapterTensors(stored, record(CachedParameters, prefix + _CACHED))

    samples = record(Samples, _SAMPLES) if f"{_SAMPLES}ids" in keywords else None
    first, *others = [adapter(number) for number in range(1 if samples is None else len(samples.dims))]
    return MarkedSite(
        base_output=keywords.get("base_output"),
        x=keywords["x"],
        bias=keywords.get("bias"),
        stored=first.stored,
        cached=first.cached,
        input_norm=record(InputNorm, _NORM) if f"{_NORM}weight" in keywords else None,
        others=tuple(others),
        samples=samples,
    )


@torch.compiler.allow_in_graph
def dora_linear(**keywords: Any) -> torch.Tensor:
    """The marker; see `mark`.

    Where no backend rewrites it, nobody refreshes buffers in front of its graph, and to write into a graph's inputs
    would break what has saved them. So it reads parameters alone.
    """
    site = read_site(keywords)
    return _adapted(site, complete_parameters([each.stored._replace(base_norm_sq=None) for each in site.adapters]))


def _adapted(site: MarkedSite, operands: list[SiteOperands]) -> torch.Tensor:
    dtype = site.stored.dtype if site.base_output is None else site.base_output.dtype
    return adapted_linear(
        site.x,
        site.stored,
        operands_of_call(site, operands),
        site.bias,
        dtype=dtype,
        base_output=site.base_output,
        input_norm=site.input_norm,
    )


def operands_of_call(site: MarkedSite, operands: Sequence[SiteOperands]) -> SiteOperands | MixedOperands:
    """Return what the formula takes for a call whose adapters' complete operands these are."""
    if site.samples is None:
        [only] = operands
        return only
    return mix([each.stored for each in site.adapters], operands, site.samples)
