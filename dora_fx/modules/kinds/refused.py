"""Layers of quantisation libraries that DoRA does not adapt, and why, by the package that a layer's class is of."""

from __future__ import annotations

from torch import nn

_SUPPORTED = (
    "expected a plain layer, bitsandbytes' of 4 or 8 bits, HQQ's, or torchao's weight-only ones (docs/quantised.md): "
    "load the model in one of these formats, or exclude the layer"
)
_REASONS = {
    "gptqmodel": "GPTQ and AWQ layers of gptqmodel",
    "auto_gptq": "GPTQ layers of auto_gptq",
    "awq": "AWQ layers of autoawq",
    "quanto": "quanto's layers",
    "optimum": "quanto's layers",
    "aqlm": "AQLM layers",
    "eetq": "EETQ layers",
    "vptq": "VPTQ layers",
    "compressed_tensors": "layers of compressed-tensors",
}


def refused_package_maybe(module: nn.Module) -> str | None:
    """Return what was found and expected of a layer whose package stores weights in a format that is not supported."""
    found = type(module)
    what = _REASONS.get(found.__module__.partition(".")[0])
    if what is None and found.__module__.startswith("transformers.integrations."):
        what = "quantised layers of transformers' own"
    return None if what is None else f"found a {found.__name__}: {what} are not supported; {_SUPPORTED}"
