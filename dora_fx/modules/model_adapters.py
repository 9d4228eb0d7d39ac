"""Operations on all adapters of a model: switch them off for a while, invalidate what is cached of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dora_fx.megatron import Model, chunks_of
from dora_fx.modules.adapter_bank import bank_of, sites_of


def invalidate_norms(model: Model) -> None:
    """Invalidate everything that is cached of a model's adapters, and the base's norms.

    Optimizer steps, in-place writes, loads, casts and moves are noticed without it, and on a CPU every write into an
    adapter. Call it after other writes past PyTorch's version counter, which writes through `.data` or by a collective
    are: on an accelerator after those outside an optimizer's step, where a later forward pass raises
    StaleParametersError without the call; everywhere after those into a few rows of a base weight, of which a sample of
    rows is compared.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped. Every rank of a tensor-parallel group
            calls it.
    """
    for chunk in chunks_of(model):
        # Those of adapters that are not active read the same base.
        for sites in (sites_of(chunk), *bank_of(chunk).inactive.values()):
            for site in sites:
                site.invalidate_norm()


@contextmanager
def disable_adapter(model: Model) -> Iterator[None]:
    """Within the context every adapter of the model is off; each returns to the state it had before.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped.
    """
    sites = [site for chunk in chunks_of(model) for site in sites_of(chunk)]
    before = [site._adapter_enabled for site in sites]
    try:
        for site in sites:
            site.disable_adapter_layers()
        yield
    finally:
        for site, enabled in zip(sites, before, strict=True):
            site._adapter_enabled = enabled
