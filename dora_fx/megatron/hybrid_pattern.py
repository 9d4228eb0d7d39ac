"""The layers of Megatron's HybridModel, one symbol each, as its `hybrid_layer_pattern` has them."""

from __future__ import annotations

from torch import nn

from dora_fx.megatron.wrappers import unwrap

ATTENTION, MLP = "*", "-"
_STAGE_BOUNDARY = "|"


def hybrid_pattern_maybe(chunk: nn.Module) -> str | None:
    """Return the layer pattern of a chunk's whole model, without boundaries of pipeline stages; None for a GPTModel."""
    pattern: str | None = getattr(unwrap(chunk), "hybrid_layer_pattern", None)
    return None if pattern is None else pattern.replace(_STAGE_BOUNDARY, "")


def is_attention_and_mlp(pattern: str) -> bool:
    """Return whether the layers are an attention and an MLP by turns, which together are the layers of a GPTModel."""
    return bool(pattern) and pattern == (ATTENTION + MLP) * (len(pattern) // 2)
