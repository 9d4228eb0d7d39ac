"""The marker: one node per DoRA site in a Dynamo graph, and its eager meaning.

`DoRALinear` calls the base layer as it is and then `dora_linear`. Dynamo keeps the call as a single node,
which the `dora_fx` backend rewrites. Any other backend traces into it, and eager code runs it, so the
function is the same whoever compiles; nothing is dropped where the rewrite does not run.
"""

from __future__ import annotations

import torch

from dora_fx.functional import adapted_linear
from dora_fx.parameter_cache import measure_base
from dora_fx.site_parameters import StoredParameters, complete_parameters
from dora_fx.site_paths import path_of


@torch.compiler.allow_in_graph
def dora_linear(
    base_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_norm_sq: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    cached_norm: torch.Tensor,
    cached_lora_a: torch.Tensor | None,
    cached_lora_b: torch.Tensor | None,
    scaling: torch.Tensor,
    dropout_threshold: torch.Tensor | None,
    dropout_rescale: torch.Tensor | None,
    *,
    layout: str,
    tp_group: str,
) -> torch.Tensor:
    """Turn the base layer's output into the DoRA layer's; see `functional.adapted_linear`.

    `base_output` is what the base layer returned for `x`, with `bias` where the layer adds it itself. The cached
    tensors are for the backend, which refreshes them before it runs its graph (`parameter_cache.py`). Another compiler
    traces this function, and nobody refreshes anything then: all is computed from the parameters.
    """
    if not torch.compiler.is_compiling():
        measure_base(path_of(lora_a), weight, base_norm_sq)
    stored = StoredParameters(
        weight=weight,
        base_norm_sq=None if torch.compiler.is_compiling() else base_norm_sq,
        lora_a=lora_a,
        lora_b=lora_b,
        magnitude=magnitude,
        scaling=scaling,
        dropout_threshold=dropout_threshold,
        dropout_rescale=dropout_rescale,
        layout=layout,
        tp_group=tp_group,
        dtype=weight.dtype,
    )
    [complete] = complete_parameters([stored])
    return adapted_linear(x, stored, complete, bias, dtype=base_output.dtype, base_output=base_output)
