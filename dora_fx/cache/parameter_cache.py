"""Compute the values that follow from DoRA's parameters alone once per optimizer step, and not once per call.

The scales of rows, and the factors that a layout gathers, are in buffers of each site. `refresh` computes those that
are out of date, for all sites of a graph together: one gather and one reduction per process group, whatever the number
of sites. Micro-batches, recomputation, evaluation and generation then read them. A buffer that was never computed holds
NaN, so a forgotten refresh shows in the first output.

A refresh communicates, so all ranks of a group have to refresh the same sites. After an optimizer's step they do, as
every rank steps. In all other cases they first agree on the sites that are out of date on any of them. A rank that
alone moved its parameters finds the same bits and has nothing to refresh; one that alone changed them gets an error in
place of a collective that the others never join.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from dora_fx.cache.active_adapter import raise_if_changed
from dora_fx.cache.freshness import (
    CacheEntry,
    StaleParametersError,
    are_up_to_date,
    is_from_earlier_step,
    raise_if_found_stale,
    record,
)
from dora_fx.function import (
    BaseWeight,
    CachedParameters,
    Layout,
    RowScale,
    SiteOperands,
    StoredParameters,
    complete_parameters,
    measured_base_norm,
    norm_dtype,
    sources_of,
    tensors_of,
)
from dora_fx.ranks import group_size, stale_on_any_rank

# Seconds. Ranks come to a refresh apart by as much as their earlier work differs, compilation included.
RANK_TIMEOUT = 300.0


class CachedSite(NamedTuple):
    """One site at run time: its parameters and the buffers that are computed from them.

    Attributes:
        path: module path, for messages.
        stored: this rank's parameters.
        cached: this rank's buffers.
    """

    path: str
    stored: StoredParameters
    cached: CachedParameters


def empty_base_norm(weight: BaseWeight, num_experts: int | None = None) -> torch.Tensor:
    """Allocate the buffer of `measure_base`, `[out]` or this rank's `[out/tp]`, NaN until it is computed.

    Args:
        weight: W0, or that of any expert.
        num_experts: how many a grouped site has, whose buffer is `[experts, out]`; None for any other.
    """
    shape = (weight.shape[0],) if num_experts is None else (num_experts, weight.shape[0])
    return torch.full(shape, torch.nan, dtype=norm_dtype(weight.dtype), device=weight.device)


def empty_cache(
    base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, layout: Layout, tp_group: str
) -> CachedParameters:
    """Allocate one site's buffers, NaN until a refresh computes them.

    A factor that its layout does not gather, or a group of one rank has whole, needs no buffer.
    """
    tp_size = group_size(tp_group)

    def gathered(factor: torch.Tensor, is_gathered: bool) -> torch.Tensor | None:
        # In front of the rows a grouped site's factor has the dimension of experts.
        *experts, rows, features = factor.shape
        whole_shape = (*experts, tp_size * rows, features)
        return factor.new_full(whole_shape, torch.nan) if is_gathered and tp_size > 1 else None

    delta, grad_gain, grad_scale = (torch.full_like(base_norm_sq, torch.nan) for _ in RowScale._fields)
    return CachedParameters(
        delta,
        grad_gain,
        grad_scale,
        gathered(lora_a, layout.gathers_lora_a),
        gathered(lora_b, layout.gathers_lora_b),
    )


def refresh(sites: Sequence[CachedSite], rank_timeout: float = RANK_TIMEOUT) -> bool:
    """Bring the buffers of all stale sites up to date, in place, and return whether any were stale.

    Args:
        sites: of one graph, the same on every rank of their tensor-parallel groups.
        rank_timeout: how long other ranks may take to agree, in seconds.

    Raises:
        StaleParametersError: an earlier call on an accelerator used a value that was out of date.
        RuntimeError: the parameters of this rank changed outside an optimizer's step, and another rank's did not.
        RuntimeError: the memory of a parameter was freed.
        RuntimeError: a backward pass repeats a call of another adapter than the active one.
        ValueError: the parameters are fake tensors; or adapters are about to be trained beside tensors that were made
            in inference mode.
    """
    raise_if_changed((site.path, site.stored.lora_a) for site in sites)
    if torch.is_grad_enabled():
        _refuse_inference_tensors(sites)
    with torch.no_grad():
        return _refresh(sites, rank_timeout)


def _refuse_inference_tensors(sites: Sequence[CachedSite]) -> None:
    for path, stored, _ in sites:
        named = [("weight", tensor) for tensor in tensors_of(stored.weight)]
        named += [(f"weight{number}", weight) for number, weight in enumerate(stored.expert_weights or ())]
        named += [(name, getattr(stored, name)) for name in ("lora_a", "lora_b", "magnitude")]
        if any(tensor.requires_grad for _, tensor in named):
            for name, tensor in named:
                if tensor.is_inference():
                    raise ValueError(
                        f"{path}: found a {name} that was made under torch.inference_mode(), expected an ordinary "
                        "tensor, since autograd refuses others; make the model outside, or put a clone in its place"
                    )


def _refresh(sites: Sequence[CachedSite], rank_timeout: float) -> bool:
    raise_if_found_stale()
    bases, entries = [_base_entry(site) for site in sites], [_entry(site) for site in sites]
    # All at once, since on an accelerator a comparison of many small tensors costs what a comparison of few does.
    up_to_date = are_up_to_date([*bases, *entries])
    is_stale = [not flag for flag in up_to_date[len(sites) :]]
    for index, base_is_up_to_date in enumerate(up_to_date[: len(sites)]):
        if not base_is_up_to_date:
            _compute_base_norm(bases[index], sites[index].stored)
            # The base's norm is a source of the scales, which were compared with the norm as it was before.
            [flag] = are_up_to_date([entries[index]])
            is_stale[index] = not flag
    for entry, flag in zip(entries, is_stale, strict=True):
        if flag:
            _raise_if_unreadable(entry)
    # What a step made stale is so on every rank, and they need not ask each other. They do for all else: adapters count
    # their steps apart.
    by_step = [is_from_earlier_step(site.cached.delta) for site in sites]
    otherwise = [flag and not stepped for flag, stepped in zip(is_stale, by_step, strict=True)]
    if any(otherwise):
        agreed = _agree(sites, otherwise, rank_timeout)
        is_stale = [flag or stepped for flag, stepped in zip(agreed, by_step, strict=True)]
    stale = [site for site, flag in zip(sites, is_stale, strict=True) if flag]
    completed = complete_parameters([site.stored for site in stale]) if stale else []
    buffers: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for site, complete in zip(stale, completed, strict=True):
        for buffer, value in _buffers_and_values(site.cached, complete):
            buffers.append(buffer)
            values.append(value)
    if buffers:
        # In place: compiled graphs, and CUDA graphs of them, read the buffers at their addresses. Private, and what
        # torch's optimizers write with: one call for all.
        torch._foreach_copy_(buffers, values)
    record([_entry(site) for site in stale])
    return bool(stale)


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
                    "its parameters were written in a way that the cache does not notice: call "
                    "dora_fx.invalidate_norms(model) after writing"
                )


@torch.no_grad()
def measure_base(site: CachedSite) -> None:
    """Bring the frozen weight's squared norms up to date, in place, if the weight is not what they were computed from.

    It takes no communication: each rank has the norms of its own shard. Writes past PyTorch's version counter are
    noticed in a sample of rows, since to compare the whole weight would cost more than the rest of DoRA. So a write
    into the whole weight is noticed, and one into a few rows may not be.

    Raises:
        RuntimeError: the weight's memory was freed.
        ValueError: the weight is a fake tensor.
    """
    entry = _base_entry(site)
    [is_up_to_date] = are_up_to_date([entry])
    if not is_up_to_date:
        _compute_base_norm(entry, site.stored)


def _compute_base_norm(entry: CacheEntry, stored: StoredParameters) -> None:
    _raise_if_unreadable(entry)
    base_norm_sq, squares = entry.value, measured_base_norm(stored)
    # Equal norms are not written: the write would count as one into a source of the scales.
    if not torch.equal(squares, base_norm_sq):
        base_norm_sq.copy_(squares)
    record([entry])


def _base_entry(site: CachedSite) -> CacheEntry:
    stored = site.stored
    assert stored.base_norm_sq is not None
    return CacheEntry(site.path, stored.base_norm_sq, stored.expert_weights or sources_of(stored.weight), frozen=True)


def _entry(site: CachedSite) -> CacheEntry:
    stored, (delta, *others) = site.stored, site.cached
    assert stored.base_norm_sq is not None
    # The base weight itself is left out: it is large, and enters through its norms alone.
    sources = [stored.lora_a, stored.lora_b, stored.magnitude, stored.base_norm_sq, stored.scaling]
    return CacheEntry(site.path, delta, sources, [buffer for buffer in others if buffer is not None])


def _raise_if_unreadable(entry: CacheEntry) -> None:
    """Raise where there is nothing to compute with: a fake tensor, or memory that was freed as by an offload."""
    for tensor in (*entry.sources, *entry.values):
        if isinstance(tensor, FakeTensor):
            raise ValueError(
                f"{entry.path}: found fake tensors, which have no values to compute a norm from, expected real ones; "
                "a model under FakeTensorMode can be traced, and dora_fx.explain says what it costs"
            )
        if tensor.numel() and not tensor.untyped_storage().nbytes():
            found = f"found a tensor {tuple(tensor.shape)} of it whose memory was freed"
            raise RuntimeError(f"{entry.path}: {found}, expected parameters that hold their values")


def _agree(sites: Sequence[CachedSite], is_stale: list[bool], rank_timeout: float) -> list[bool]:
    """Add the sites that are stale on other ranks; every rank that finds a stale site waits for its whole group.

    A group without a stale site on this rank exchanges nothing, so a call whose cache is up to date never waits. If
    another rank of the group has a stale site, that rank gets an error after `rank_timeout` seconds.
    """
    is_stale = list(is_stale)
    # Sorted, so that ranks of several groups take part in the exchanges in the same order.
    for tp_group in sorted({site.stored.tp_group for site in sites} - {""}):
        own = [index for index, site in enumerate(sites) if site.stored.tp_group == tp_group]
        if any(is_stale[index] for index in own):
            paths = {index: sites[index].path for index in own}
            for index in stale_on_any_rank(paths, [i for i in own if is_stale[i]], tp_group, rank_timeout):
                is_stale[index] = True
    return is_stale


def _buffers_and_values(
    cached: CachedParameters, complete: SiteOperands
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    values = (*complete.scale, complete.lora_a, complete.lora_b)
    yield from ((buffer, value) for buffer, value in zip(cached, values, strict=True) if buffer is not None)
