"""Values that follow from DoRA's parameters alone are computed once per optimizer step, not once per call.

The scales of rows, and the factors that a layout gathers, are buffers of each site. `refresh` fills those that are
stale, for all sites of a graph together: one gather and one reduction per process group, whatever the number of sites.
Micro-batches, recomputation, evaluation and generation then read them. A buffer that was never filled is NaN, so a
forgotten refresh shows at once.

A stale site makes its group communicate. After an optimizer's step all ranks of a group have the same stale sites, as
each of them must step alike. In all other cases ranks agree first: one that alone moved its parameters finds the same
bits and has nothing to do, and one that alone changed them is told so where it would hang.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from dora_fx.cache.freshness import (
    Claim,
    StaleParametersError,
    are_fresh,
    is_from_earlier_step,
    raise_if_answered_stale,
    record_fresh,
)
from dora_fx.function import (
    CachedParameters,
    CompleteParameters,
    Layout,
    RowScale,
    StoredParameters,
    base_norm_squared,
    complete_parameters,
    norm_dtype,
)
from dora_fx.ranks import group_size, stale_on_any_rank

_RANK_TIMEOUT = 300.0


class CachedSite(NamedTuple):
    """One site at run time: its parameters and the buffers to keep in step with them.

    Attributes:
        path: module path, for messages.
        stored, cached: real tensors of this rank.
    """

    path: str
    stored: StoredParameters
    cached: CachedParameters


def empty_base_norm(weight: torch.Tensor) -> torch.Tensor:
    """Allocate the buffer of `measure_base`, `[out]` or this rank's `[out/tp]`, NaN until it is filled."""
    return torch.full((weight.shape[0],), torch.nan, dtype=norm_dtype(weight.dtype), device=weight.device)


def empty_cache(
    base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, layout: Layout, tp_group: str
) -> CachedParameters:
    """Allocate one site's buffers, NaN until they are refreshed."""
    tp_size = group_size(tp_group)

    def gathered(factor: torch.Tensor, is_gathered: bool) -> torch.Tensor | None:
        whole_shape = (tp_size * factor.shape[0], factor.shape[1])
        return factor.new_full(whole_shape, torch.nan) if is_gathered and tp_size > 1 else None

    delta, grad_gain, grad_scale = (torch.full_like(base_norm_sq, torch.nan) for _ in RowScale._fields)
    return CachedParameters(
        delta,
        grad_gain,
        grad_scale,
        gathered(lora_a, layout.gathers_lora_a),
        gathered(lora_b, layout.gathers_lora_b),
    )


def refresh(sites: Sequence[CachedSite], rank_timeout: float = _RANK_TIMEOUT) -> None:
    """Bring the buffers of all stale sites up to date, in place.

    Args:
        sites: of one graph, the same on every rank of their tensor-parallel groups.
        rank_timeout: how long other ranks may take to agree, in seconds.

    Raises:
        StaleParametersError: an earlier call on an accelerator used what was stale.
        RuntimeError: the parameters of this rank changed outside an optimizer's step, and another rank's did not.
        RuntimeError: the memory of a parameter was freed.
        ValueError: adapters are about to be trained beside tensors that were made in inference mode.
    """
    if torch.is_grad_enabled():
        _refuse_inference_tensors(sites)
    with torch.no_grad():
        _refresh(sites, rank_timeout)


def _refuse_inference_tensors(sites: Sequence[CachedSite]) -> None:
    for path, stored, _ in sites:
        named = {name: getattr(stored, name) for name in ("weight", "lora_a", "lora_b", "magnitude")}
        if any(tensor.requires_grad for tensor in named.values()):
            for name, tensor in named.items():
                if tensor.is_inference():
                    raise ValueError(
                        f"{path}: found a {name} that was made under torch.inference_mode(), expected an ordinary "
                        "tensor, as autograd takes no other; make the model outside, or put a clone in its place"
                    )


def _refresh(sites: Sequence[CachedSite], rank_timeout: float) -> None:
    raise_if_answered_stale()
    bases, claims = [_claim_of_base(site) for site in sites], [_claim(site) for site in sites]
    # All at once: on an accelerator a look at many small tensors costs what a look at few does.
    base_and_site = are_fresh([*bases, *claims])
    is_stale = [not fresh for fresh in base_and_site[len(sites) :]]
    for index, base_is_fresh in enumerate(base_and_site[: len(sites)]):
        if not base_is_fresh:
            _measure(bases[index])
            [is_fresh] = are_fresh([claims[index]])
            is_stale[index] = not is_fresh
    for claim, flag in zip(claims, is_stale, strict=True):
        if flag:
            _raise_if_freed(claim)
    if any(is_stale) and not any(is_from_earlier_step(site.cached.delta) for site in sites):
        is_stale = _agree(sites, is_stale, rank_timeout)
    stale = [site for site, flag in zip(sites, is_stale, strict=True) if flag]
    if not stale:
        return
    for site, complete in zip(stale, complete_parameters([site.stored for site in stale]), strict=True):
        for buffer, value in _buffers_and_values(site.cached, complete):
            buffer.copy_(value)
        record_fresh(_claim(site))


@torch.no_grad()
def check(sites: Sequence[CachedSite]) -> None:
    """Compute everything again, the base's norms too, and compare bit by bit.

    Raises:
        StaleParametersError: naming the first site whose buffers differ, and by how much.
    """
    stored = [site.stored._replace(base_norm_sq=None) for site in sites]
    for site, complete in zip(sites, complete_parameters(stored), strict=True):
        for buffer, value in _buffers_and_values(site.cached, complete):
            if not torch.equal(buffer, value):
                raise StaleParametersError(
                    f"{site.path}: its cached scales or factors are off by up to {(buffer - value).abs().max():.3e}; "
                    "its parameters were written in a way that nothing tells: call dora_fx.invalidate_norms(model) "
                    "after writing"
                )


@torch.no_grad()
def measure_base(site: CachedSite) -> None:
    """Bring the frozen weight's squared norms up to date, in place, if they were measured of other values.

    No rank needs another one for that. Writes past PyTorch's version counter are told by a sample of rows, as the
    whole weight would cost more to look at than the rest of DoRA: one into the whole weight shows, one into a few rows
    need not.

    Raises:
        RuntimeError: the weight's memory was freed.
    """
    claim = _claim_of_base(site)
    [is_fresh] = are_fresh([claim])
    if not is_fresh:
        _measure(claim)


def _measure(claim: Claim) -> None:
    _raise_if_freed(claim)
    [weight] = claim.sources
    base_norm_sq, squares = claim.value, base_norm_squared(weight)
    if not torch.equal(squares, base_norm_sq):
        base_norm_sq.copy_(squares)
    record_fresh(claim)


def _claim_of_base(site: CachedSite) -> Claim:
    weight, base_norm_sq = site.stored.weight, site.stored.base_norm_sq
    assert base_norm_sq is not None
    return Claim(site.path, base_norm_sq, (weight,), frozen=True)


def _claim(site: CachedSite) -> Claim:
    stored, (delta, *others) = site.stored, site.cached
    assert stored.base_norm_sq is not None
    sources = [stored.lora_a, stored.lora_b, stored.magnitude, stored.base_norm_sq, stored.scaling]
    return Claim(site.path, delta, sources, [buffer for buffer in others if buffer is not None])


def _raise_if_freed(claim: Claim) -> None:
    """Raise an error where reading would end the process, as after weights were offloaded."""
    for tensor in (*claim.sources, *claim.values):
        if tensor.numel() and not tensor.untyped_storage().nbytes():
            found = f"found a tensor {tuple(tensor.shape)} of it whose memory was freed"
            raise RuntimeError(f"{claim.path}: {found}, expected parameters that hold their values")


def _agree(sites: Sequence[CachedSite], is_stale: list[bool], rank_timeout: float) -> list[bool]:
    """Add the sites that are stale on other ranks; every rank that finds a stale site waits for its whole group."""
    is_stale = list(is_stale)
    for tp_group in sorted({site.stored.tp_group for site in sites} - {""}):
        own = [index for index, site in enumerate(sites) if site.stored.tp_group == tp_group]
        if any(is_stale[index] for index in own):
            described = {index: sites[index].path for index in own}
            for index in stale_on_any_rank(described, [i for i in own if is_stale[i]], tp_group, rank_timeout):
                is_stale[index] = True
    return is_stale


def _buffers_and_values(
    cached: CachedParameters, complete: CompleteParameters
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    values = (*complete.scale, complete.lora_a, complete.lora_b)
    yield from ((buffer, value) for buffer, value in zip(cached, values, strict=True) if buffer is not None)
