"""What follows from DoRA's parameters alone is worked out once per optimizer step, not once per call.

Row norms, and the factors that a layout gathers, are buffers of each site. `refresh` fills those that are stale, for
all sites of a graph together: one gather and one reduction per process group, whatever the number of sites.
Micro-batches, recomputation, evaluation and generation then read them. A buffer that was never filled is NaN, so a
forgotten refresh shows at once.

Every rank of a tensor-parallel group must step its optimizers and write its parameters alike, since a stale site
makes its group communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from dora_fx.collectives import group_size
from dora_fx.freshness import is_fresh, num_optimizer_steps, record_fresh
from dora_fx.placement import LAYOUTS
from dora_fx.site_parameters import CachedParameters, CompleteParameters, StoredParameters, complete_parameters
from dora_fx.weight_norm import base_norm_squared


class StaleParametersError(RuntimeError):
    """A cached norm or factor is not what the parameters give, although nothing said that they changed."""


class CachedSite(NamedTuple):
    """One site at run time: its parameters and the buffers to keep in step with them.

    Attributes:
        path: module path, for messages.
        stored, cached: real tensors of this rank.
    """

    path: str
    stored: StoredParameters
    cached: CachedParameters


def empty_cache(
    base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, layout: str, tp_group: str
) -> CachedParameters:
    """Allocate one site's buffers, NaN until they are refreshed."""
    table, tp_size = LAYOUTS[layout], group_size(tp_group)

    def gathered(factor: torch.Tensor, is_gathered: bool) -> torch.Tensor | None:
        whole_shape = (tp_size * factor.shape[0], factor.shape[1])
        return factor.new_full(whole_shape, torch.nan) if is_gathered and tp_size > 1 else None

    return CachedParameters(
        torch.full_like(base_norm_sq, torch.nan),
        gathered(lora_a, table.gathers_lora_a),
        gathered(lora_b, table.gathers_lora_b),
    )


@torch.no_grad()
def refresh(sites: Sequence[CachedSite]) -> None:
    """Bring the buffers of all stale sites up to date, in place."""
    for site in sites:
        stored = site.stored
        remeasure_base_if_written(stored.weight, stored.base_norm_sq, stored.layout, stored.tp_group)
    stale = [site for site in sites if not _is_fresh(site)]
    if not stale:
        return
    for site, complete in zip(stale, complete_parameters([site.stored for site in stale]), strict=True):
        for buffer, value in _buffers_and_values(site.cached, complete):
            buffer.copy_(value)
        _record_fresh(site)


@torch.no_grad()
def check(sites: Sequence[CachedSite]) -> None:
    """Work everything out again and compare, bit by bit.

    Raises:
        StaleParametersError: naming the first site whose buffers differ, and by how much.
    """
    for site, complete in zip(sites, complete_parameters([site.stored for site in sites]), strict=True):
        for buffer, value in _buffers_and_values(site.cached, complete):
            if not torch.equal(buffer, value):
                raise StaleParametersError(
                    f"{site.path}: the cached norm or factor is off by up to {(buffer - value).abs().max():.3e}; its "
                    "parameters were written in a way that moves neither their memory, nor their version, nor an "
                    "optimizer: call dora_fx.invalidate_norms(model) after writing"
                )


def remeasure_base_if_written(weight: torch.Tensor, base_norm_sq: torch.Tensor, layout: str, tp_group: str) -> None:
    """Bring the frozen weight's squared norms up to date, in place, if they were measured from other values."""
    if not is_fresh(base_norm_sq, [weight]):
        base_norm_sq.copy_(base_norm_squared(weight, layout, tp_group))
        record_fresh(base_norm_sq, [weight])


def _is_fresh(site: CachedSite) -> bool:
    return is_fresh(site.cached.norm, _sources(site), *_constants(site))


def _record_fresh(site: CachedSite) -> None:
    record_fresh(site.cached.norm, _sources(site), *_constants(site))


def _constants(site: CachedSite) -> tuple[float, int]:
    return site.stored.scaling, num_optimizer_steps()


def _sources(site: CachedSite) -> list[torch.Tensor]:
    """All that one site's record depends on: what is read, and the buffers written besides the norm."""
    stored, cached = site.stored, site.cached
    tensors = [stored.base_norm_sq, stored.lora_a, stored.lora_b, cached.lora_a, cached.lora_b]
    return [tensor for tensor in tensors if tensor is not None]


def _buffers_and_values(
    cached: CachedParameters, complete: CompleteParameters
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for name, buffer in cached._asdict().items():
        if buffer is not None:
            yield buffer, getattr(complete, name)
