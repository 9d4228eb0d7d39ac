"""Dropout whose mask depends on the element's global position, not on who computes it.

A mask drawn from a device's random stream changes with the compiler (Inductor has its own generator), with
the tensor-parallel size and with the order of calls. Here one 64-bit key is drawn per call from the default
generator, which Megatron seeds alike on the ranks of a tensor-parallel group, and each element is kept or
dropped by hashing the key with its token and feature index. So the mask is the same in eager and compiled code,
identical where the input is replicated, and where the input is sharded each rank computes its own part of
the one mask that a single rank would use. Recomputation replays it, as it replays the generator's state.

The hash is a pair of multiply-xorshift rounds (`h ^= h >> 16; h *= odd; h ^= h >> 15`), as in the finalisers
of MurmurHash3 and the lowbias32 family, in int64 with multipliers below 2**31 so that nothing overflows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from dora_fx.ranks import group_rank

_MASK32 = 0xFFFFFFFF
_FIRST_MULTIPLIER = 0x7FEB352D
_SECOND_MULTIPLIER = 0x21F0AAAD


@torch.library.custom_op("dora_fx::draw_dropout_key", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_dropout_key(like: torch.Tensor, tp_group: str) -> torch.Tensor:
    halves = torch.randint(0, 2**32, (2,), dtype=torch.int64, device=like.device)
    return torch.cat((halves, halves.new_tensor([group_rank(tp_group)])))


@_draw_dropout_key.register_fake
def _(like: torch.Tensor, tp_group: str) -> torch.Tensor:
    return like.new_empty((3,), dtype=torch.int64)


def draw_dropout_key(like: torch.Tensor, tp_group: str) -> torch.Tensor:
    """Draw the key of one dropout call from the default generator of `like`'s device.

    Returns:
        int64 `[3]`: the two 32-bit halves of the key and this process's rank in the tensor-parallel group.
        The rank travels as data, so the graphs of all ranks are the same.
    """
    if has_torch_function_unary(like):
        return handle_torch_function(draw_dropout_key, (like,), like, tp_group)
    return _draw_dropout_key(like.detach(), tp_group)


class DropoutFactors(NamedTuple):
    """A probability p of dropping an element, as the tensors that compiled code computes with.

    Attributes:
        threshold: int64 `[1]`, 2**32 p: random 32-bit numbers below it drop an element.
        rescale: 1 / (1 - p), `[1]`, in the dtype of norms and magnitudes.
    """

    threshold: torch.Tensor
    rescale: torch.Tensor

    @classmethod
    def of(cls, p: float, dtype: torch.dtype, device: torch.device | str) -> DropoutFactors:
        """The factors of p, in [0, 1)."""
        return cls(
            torch.tensor([int(p * 2**32)], dtype=torch.int64, device=device),
            torch.tensor([1.0 / (1.0 - p)], dtype=dtype, device=device),
        )


def _scramble(h: torch.Tensor) -> torch.Tensor:
    h = ((h ^ (h >> 16)) * _FIRST_MULTIPLIER) & _MASK32
    h = ((h ^ (h >> 15)) * _SECOND_MULTIPLIER) & _MASK32
    return h ^ (h >> 15)


def keep_mask(
    x: torch.Tensor, key: torch.Tensor, threshold: torch.Tensor, sharded_features: bool, sharded_tokens: bool = False
) -> torch.Tensor:
    """Return the boolean mask of the elements that survive, of x's shape.

    Args:
        x: `[..., features]`; only its shape and device are read.
        key: from `draw_dropout_key`.
        threshold: see `DropoutFactors`; `[1]`, or `[..., 1]` for a probability of each sample or token.
        sharded_features: x holds this rank's slice of the features, so its indices start at
            `tp_rank * features`.
        sharded_tokens: x holds this rank's slice of the sequence, whose tokens are counted likewise.
    """
    features = torch.arange(x.shape[-1], device=x.device)
    if sharded_features:
        features = features + key[2] * x.shape[-1]
    tokens = torch.arange(x.numel() // max(x.shape[-1], 1), device=x.device)
    if sharded_tokens:
        tokens = tokens + key[2] * tokens.shape[0]
    rows = _scramble(_scramble(tokens ^ key[0]) ^ key[1])
    bits = _scramble(rows.unsqueeze(-1) ^ _scramble(features + key[1] & _MASK32))
    return bits.view(x.shape) >= threshold


def dropout(
    x: torch.Tensor,
    key: torch.Tensor,
    threshold: torch.Tensor,
    rescale: torch.Tensor,
    sharded_features: bool,
    sharded_tokens: bool = False,
) -> torch.Tensor:
    """Zero the elements of `x` outside `keep_mask` and scale the rest; see `DropoutFactors`."""
    if has_torch_function_unary(x):
        return handle_torch_function(dropout, (x,), x, key, threshold, rescale, sharded_features, sharded_tokens)
    keep = keep_mask(x, key, threshold, sharded_features, sharded_tokens)
    # Without a dimension the factor leaves x's dtype alone.
    kept = x * rescale.view(()) if rescale.dim() == 1 else (x * rescale).to(x.dtype)
    return torch.where(keep, kept, 0.0)
