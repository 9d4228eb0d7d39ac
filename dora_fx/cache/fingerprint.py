"""Numbers that change when the bits of a tensor do, cheap enough to be computed before every forward pass.

    fingerprint = sum over 64-bit words of  (word ^ word >> 32) * mix(position)      modulo 2^64

`mix` gives odd numbers, so a change of one word always shows, and chance hides a change of many in one case of 2^32 at
most. Without the shift, flipping the sign of an even number of float64 would: a top bit times any odd number is that
bit. Integer sums do not depend on the order of their terms, hence not on threads or vector units either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_factors: dict[torch.device, torch.Tensor] = {}


def mix(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers without visible order for the indices from `start`, int64 `[count]`."""
    index = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    mixed = index * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)) | 1


@torch.no_grad()
def fingerprint(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Fingerprint of the tensors' bits in their order, int64 `[]` on the device of the first.

    Nothing waits for the device. Tensors of other devices are not looked at together; strided ones are copied.
    """
    words = [_words(tensor.detach()) for tensor in tensors]
    if not words[0].is_cpu:
        # One launch for all of them.
        return _weighted_sum(torch.cat(words))
    return _weighted_sum(torch.stack([_weighted_sum(part) for part in words]))


def _weighted_sum(words: torch.Tensor) -> torch.Tensor:
    mixed = words >> 32
    mixed ^= words
    factors = _factors_of(words)
    # Only the CPU has a dot product of integers.
    return torch.dot(mixed, factors) if words.is_cpu else (mixed * factors).sum()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as int64 `[n]`: eight bytes to a word where that fits, else one element."""
    flat = tensor.reshape(-1)
    size = flat.element_size()
    if (flat.numel() * size) % 8 or (flat.storage_offset() * size) % 8:
        return flat.view(_INTEGERS[size]).to(torch.int64)
    return flat.view(torch.int64)


def _factors_of(words: torch.Tensor) -> torch.Tensor:
    known = _factors.get(words.device)
    if known is None or known.numel() < words.numel():
        known = _factors[words.device] = mix(0, max(words.numel(), 1024), words.device)
    return known[: words.numel()]
