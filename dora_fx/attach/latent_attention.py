"""Warn of multi-latent attention whose backward pass Megatron approximates on several tensor-parallel ranks.

All heads share the part of the keys that is rotated by positions, and each rank has some of the heads. Megatron (0.16
to 0.19) sums this part's gradient over the ranks in one case alone: a duplicated down-projection, which is Transformer
Engine's, under sequence parallelism. In all other cases a rank continues with its own heads' share, with adapters or
without, and everything before that attention gets a wrong gradient. The forward pass is right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from dora_fx.megatron import walk
from dora_fx.modules import DoRALinear

logger = logging.getLogger(__name__)

_DOWN_PROJECTIONS = ("linear_kv_down_proj", "linear_qkv_down_proj")


def warn_of_approximate_backward(chunks: Sequence[nn.Module]) -> None:
    """Log a warning for attentions whose backward pass is approximate, with the settings under which it is exact."""
    paths = [
        f"{named.whole_path}.{name}"
        for chunk in chunks
        for named in walk(chunk, DoRALinear)
        for name in _DOWN_PROJECTIONS
        if _is_approximate(named.module, name)
    ]
    if paths:
        logger.warning(
            "%s (%d such layers): found multi-latent attention on several tensor-parallel ranks, expected it with "
            "sequence_parallel=True and Transformer Engine's layers, or on one rank: Megatron's backward pass leaves "
            "out what the other ranks' heads add to the gradient of the keys' positions, with adapters and without. "
            "The forward pass is exact",
            paths[0],
            len(paths),
        )


def _is_approximate(attention: Any, name: str) -> bool:
    projection = getattr(attention, name, None)
    config = getattr(attention, "config", None)
    if not isinstance(projection, nn.Module) or config is None or config.tensor_model_parallel_size == 1:
        return False
    linear = projection.to_wrap if isinstance(projection, DoRALinear) else projection
    is_duplicated = getattr(linear, "parallel_mode", "column") is None
    return not (is_duplicated and config.sequence_parallel)
