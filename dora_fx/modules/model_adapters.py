"""Operations on all adapters of a model: switch them off for a while, invalidate what is cached of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dora_fx.megatron import Model, chunks_of
from dora_fx.modules.linear_wrapper import DoRALinear


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
    for site in _sites(model):
        site.invalidate_norm()


@contextmanager
def disable_adapter(model: Model) -> Iterator[None]:
    """Within the context every adapter of the model is off; each returns to the state it had before.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped.
    """
    sites = _sites(model)
    before = [site._adapter_enabled for site in sites]
    try:
        for site in sites:
            site.disable_adapter_layers()
        yield
    finally:
        for site, enabled in zip(sites, before, strict=True):
            site._adapter_enabled = enabled


def _sites(model: Model) -> list[DoRALinear]:
    return [module for chunk in chunks_of(model) for module in chunk.modules() if isinstance(module, DoRALinear)]
