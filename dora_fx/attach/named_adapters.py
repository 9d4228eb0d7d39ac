"""Several adapters on one base: add, change, delete, and use one for a while.

One adapter is active. It is what a model with a single adapter has: its parameters are those that `model.parameters()`
yields, its state-dict keys are the same, and saving, loading, exporting, importing and merging work on it. Names are
PEFT's, as is that of an adapter that was attached by `DoRA` itself, "default".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.distributed.tensor import DTensor

from dora_fx.attach.config import DoRA
from dora_fx.attach.kept_adapter import is_merged
from dora_fx.megatron import Model, ModelT, chunks_of, data_parallel_around, reduces_all, unwrap, walk
from dora_fx.modules import (
    AdapterBank,
    DoRALinear,
    bank_of,
    check_places,
    count_steps_apart,
    fit_to_base,
    guard_changes,
    keep_bank,
    path_of_inner_bank_maybe,
    put_in,
    sites_of,
    take_out,
)
from dora_fx.ranks import of_all_parts

_NOT_REDUCED = (
    "found {} made for another adapter, which would not reduce the gradients of this one, expected a wrapper that was "
    "made while this one was active"
)


def add_adapter(model: ModelT, name: str, dora: DoRA) -> ModelT:
    """Add an adapter with settings of its own to a model, which is returned; the active adapter stays active.

    The first adapter of a model becomes the active one. Adapters may have other targets, ranks, alphas and dropouts;
    what one trains is no part of another. Every rank calls it. Everything is checked before anything is changed.

    Args:
        model: a model, or a list or a tuple of model chunks. With an adapter it must not be wrapped for data
            parallelism yet, since the wrappers' buffers hold the parameters of one adapter: add all adapters first,
            and make a wrapper for each while it is active.
        name: a new one, without dots.
        dora: as for a call of `DoRA` on the model; its `report` is that of this adapter.

    Raises:
        ValueError: the name is taken, empty or has a dot; the model is merged, wrapped for data parallelism or sharded,
            or has its adapter switched off; or as a call of `DoRA` raises.
        TypeError: as a call of `DoRA` raises.
    """
    chunks = chunks_of(model)
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name: found {name!r}, expected a name of an adapter, without dots")
    taken = _names_of_all_stages(chunks)
    if name in taken:
        raise ValueError(f"adapter {name!r}: found it on the model already, expected another name than {list(taken)}")
    check_changeable(chunks)
    if not taken:
        dora(model)
        for chunk in chunks:
            keep_bank(chunk, AdapterBank(name))
        return model
    _check_unwrapped(chunks, name)
    added = _attach_beside(model, chunks, dora)
    for chunk, sites in zip(chunks, added, strict=True):
        # A chunk without a layer of the active adapter has it nevertheless.
        bank = bank_of(chunk) if bank_of(chunk).active is not None else AdapterBank(taken[0])
        bank.inactive = {**{other: [] for other in taken[1:]}, **bank.inactive, name: sites}
        keep_bank(chunk, bank)
        guard_changes(chunk, bank)
        count_steps_apart(chunk, bank)
    return model


def _names_of_all_stages(chunks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Return the names of a model's adapters, the active one first, though a stage may have no layer of some."""
    own = adapter_names(chunks)
    of_stages = of_all_parts(own) if parallel_state.model_parallel_is_initialized() else [own]
    return tuple(dict.fromkeys(name for names in of_stages for name in names))


def _attach_beside(model: Model, chunks: Sequence[nn.Module], dora: DoRA) -> list[list[DoRALinear]]:
    """Attach an adapter and return its wrappers of each chunk, with all else as it was, also after an exception."""
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    trained = [(parameter, parameter.requires_grad) for chunk in chunks for parameter in chunk.parameters()]
    active = [take_out(chunk) for chunk in chunks]
    try:
        dora(model)
    finally:
        added = [take_out(chunk) for chunk in chunks]
        for chunk, sites in zip(chunks, active, strict=True):
            put_in(chunk, sites)
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
    return added


def set_adapter(model: ModelT, name: str) -> ModelT:
    """Make an adapter the active one, on every rank; the model is returned.

    Nothing is computed or compiled for it: each adapter keeps its norms, and adapters of the same targets and ranks
    share one compiled graph. Optimizers keep the parameters that they were made with. An adapter that is not active
    gets no gradient; it has the dtype and the device that the base has when it becomes active.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped. A wrapper for data parallelism knows the
            adapter that was active when it was made; another one's gradients it would not reduce, so it is refused
            here, and where the bare model is given, by the wrapper's next call.
        name: of an adapter of the model.

    Raises:
        ValueError: there is no such adapter, the model is merged, its adapter is switched off, or a wrapper around it
            does not know the parameters of this one.
    """
    chunks = chunks_of(model)
    check_known(chunks, name)
    if all(bank_of(chunk).active == name for chunk in chunks):
        return model
    check_changeable(chunks)
    for chunk in chunks:
        check_places(chunk, name, bank_of(chunk).inactive[name])
    _check_wrappers_know(chunks, name)
    for chunk in chunks:
        fit_to_base(bank_of(chunk).inactive[name])
    for chunk in chunks:
        make_active(chunk, name)
    return model


def make_active(chunk: nn.Module, name: str) -> None:
    """Make an adapter of a chunk the active one, which fits and is not refused."""
    bank = bank_of(chunk)
    if bank.active in (None, name):
        return
    assert bank.active is not None
    sites = bank.inactive.pop(name)
    bank.inactive[bank.active] = take_out(chunk)
    put_in(chunk, sites)
    bank.active = name
    bank.record.note_change(name)
    guard_changes(chunk, bank)


@contextmanager
def adapter(model: Model, name: str) -> Iterator[None]:
    """Within the context an adapter is the active one; afterwards, also after an exception, the one of before is.

    Raises:
        ValueError: as `set_adapter` raises.
    """
    before = active_adapter(model)
    set_adapter(model, name)
    try:
        yield
    finally:
        if before is not None:
            set_adapter(model, before)


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Delete an adapter that is not active, on every rank; the model is returned.

    Raises:
        ValueError: there is no such adapter, or it is the active one.
    """
    chunks = chunks_of(model)
    check_known(chunks, name)
    if active_adapter(chunks) == name:
        raise ValueError(
            f"adapter {name!r}: found it active, expected another one to be: call set_adapter before, or merge it"
        )
    for chunk in chunks:
        bank = bank_of(chunk)
        if bank.is_mixed:
            raise ValueError(f"adapter {name!r}: found a mixed batch, expected the end of the context of dora_fx.mixed")
        del bank.inactive[name]
        bank.record.note_deletion(name)
        guard_changes(chunk, bank)
    return model


def active_adapter(model: Model) -> str | None:
    """Return the name of the active adapter; None for a model without adapters."""
    return next((name for chunk in chunks_of(model) if (name := bank_of(chunk).active) is not None), None)


def adapter_names(model: Model) -> tuple[str, ...]:
    """Return the names of all adapters of a model, the active one first."""
    return tuple(dict.fromkeys(name for chunk in chunks_of(model) for name in bank_of(chunk).names))


def check_known(chunks: Sequence[nn.Module], name: str) -> None:
    """Raise ValueError unless a model has an adapter of that name."""
    names = adapter_names(chunks)
    if name not in names:
        raise ValueError(f"adapter {name!r}: found no such adapter, expected one of {list(names)}")


def check_changeable(chunks: Sequence[nn.Module]) -> None:
    """Raise ValueError where changing the adapter would lose what the caller did to the active one."""
    for chunk in chunks:
        if (inner := path_of_inner_bank_maybe(chunk)) is not None:
            raise ValueError(f"{inner}: found adapters that were added to this part of the model, expected the whole")
        if bank_of(chunk).is_mixed:
            raise ValueError("model: found a mixed batch, expected the end of the context of dora_fx.mixed")
        for _, path, module in walk(chunk, DoRALinear):
            if isinstance(module, DoRALinear):
                if not module._adapter_enabled:
                    raise ValueError(f"{path}: found its adapter switched off, expected it on: leave disable_adapter")
            elif is_merged(module):
                raise ValueError(f"{path}: found the adapter merged into it, expected unmerge or the end of `merged`")


def _check_unwrapped(chunks: Sequence[nn.Module], name: str) -> None:
    if wrappers := data_parallel_around(chunks):
        raise ValueError(
            f"adapter {name!r}: found {type(wrappers[0]).__name__} around the model, whose buffers were made for the "
            "adapter that it has, expected the bare model: add all adapters first, and make a wrapper for each"
        )


def _check_wrappers_know(chunks: Sequence[nn.Module], name: str) -> None:
    """Raise ValueError if gradients of an adapter would not be reduced over the ranks that those of the active one are.

    A wrapper is made while its adapter is active, so a bare model may change to one that no wrapper knows yet. A call
    of a wrapper that was made for another adapter then raises.
    """
    for chunk in chunks:
        coming = [p for site in bank_of(chunk).inactive[name] for p in site.adapter.parameters() if p.requires_grad]
        leaving = [p for site in sites_of(chunk) for p in site.adapter.parameters()]
        if coming and any(isinstance(p, DTensor) for p in leaving) and not all(isinstance(p, DTensor) for p in coming):
            raise ValueError(f"adapter {name!r}: " + _NOT_REDUCED.format("fully_shard"))
        given = set(chunk.modules())
        for wrapper in data_parallel_around([chunk]):
            if wrapper in given and not reduces_all(wrapper, coming):
                raise ValueError(f"adapter {name!r}: " + _NOT_REDUCED.format(type(wrapper).__name__))
            # One that is not given may be called nevertheless, and each may be when another adapter is active.
            if not any(isinstance(hook, _WrapperGuard) for hook in wrapper._forward_pre_hooks.values()):
                wrapper.register_forward_pre_hook(_WrapperGuard(unwrap(chunk)))


@dataclass
class _WrapperGuard:
    """A forward pre-hook of a wrapper for data parallelism around a chunk whose active adapter may be another's."""

    chunk: nn.Module

    def __call__(self, wrapper: nn.Module, args: Any) -> None:
        # Before a mixed batch, all its adapters are checked.
        if torch.is_grad_enabled() and not bank_of(self.chunk).is_mixed:
            trained = [p for site in sites_of(self.chunk) for p in site.adapter.parameters() if p.requires_grad]
            if not reduces_all(wrapper, trained):
                name = bank_of(self.chunk).active
                raise ValueError(f"adapter {name!r}: " + _NOT_REDUCED.format(type(wrapper).__name__))
