"""The marker: one node per DoRA site in a Dynamo graph, and its eager meaning.

`DoRALinear` calls the base layer as it is and then marks its output. Dynamo keeps the marker as a single node,
which the `dora_fx` backend rewrites. Any other backend traces into it, and eager code runs it, so the
function is the same whoever compiles; nothing is dropped where the rewrite does not run.

A node takes tensors and constants one by one: `mark` packs a site into them, and `unpack` reads them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dora_fx.functional import adapted_linear
from dora_fx.parameter_cache import measure_base
from dora_fx.site_parameters import CachedParameters, StoredParameters, complete_parameters
from dora_fx.site_paths import path_of


class MarkedSite(NamedTuple):
    """One call of an adapted layer; in a graph the tensors are nodes.

    Attributes:
        base_output: what the base layer returned for `x`, with `bias` where the layer adds it itself.
        x: the layer's input, see `functional.adapted_linear`.
        bias: the bias that the base layer adds itself, None if it returns it or has none.
        stored: the site's parameters.
        cached: the site's buffers. Only the dora_fx backend has them refreshed before it runs a graph.
    """

    base_output: torch.Tensor
    x: torch.Tensor
    bias: torch.Tensor | None
    stored: StoredParameters
    cached: CachedParameters


def mark(site: MarkedSite) -> torch.Tensor:
    """Turn the base layer's output into the DoRA layer's, as one node where Dynamo traces."""
    return dora_linear(site.base_output, site.x, site.bias, *site.stored, *site.cached)


def unpack(arguments: Sequence[Any]) -> MarkedSite:
    """The site that `mark` packed into a marker's arguments."""
    base_output, x, bias, *fields = arguments
    num_stored = len(StoredParameters._fields)
    return MarkedSite(
        base_output, x, bias, StoredParameters(*fields[:num_stored]), CachedParameters(*fields[num_stored:])
    )


@torch.compiler.allow_in_graph
def dora_linear(*arguments: Any) -> torch.Tensor:
    """The marker; see `mark`. Everything is computed from the parameters, and the cached tensors are not read."""
    base_output, x, bias, stored, _ = unpack(arguments)
    if torch.compiler.is_compiling():
        # Another compiler's graph runs without anybody who keeps the base's norms up to date.
        stored = stored._replace(base_norm_sq=None)
    else:
        assert stored.base_norm_sq is not None
        measure_base(path_of(stored.lora_a), stored.weight, stored.base_norm_sq)
    [complete] = complete_parameters([stored])
    return adapted_linear(x, stored, complete, bias, dtype=base_output.dtype, base_output=base_output)
