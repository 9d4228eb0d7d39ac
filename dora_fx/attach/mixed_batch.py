"""Batches of which each sample, or each token of packed sequences, has an adapter of its own.

The wrappers of the batch's first adapter are in the model, and each knows those of the others on the same layer. So a
compiled region has one graph for all batches of the same adapters: ids are inputs of it, and which adapter was active
before makes no difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dora_fx.attach.named_adapters import adapter_names, check_changeable, check_known, make_active
from dora_fx.megatron import Model, chunks_of, data_parallel_around, reduces_all
from dora_fx.modules import (
    DoRALinear,
    MixedAdapter,
    SiteMixture,
    bank_of,
    check_places,
    fit_to_base,
    guard_changes,
    keep_bank,
    sites_of,
)
from dora_fx.ranks import group_rank, group_size

# A name for each mixed batch of the process, by which a repeated call is known.
_numbers = itertools.count(1)


@contextmanager
def mixed(model: Model, ids: Any, adapters: Sequence[str] | None = None) -> Iterator[None]:
    """Within the context, each sample or each token of the model's input has an adapter of its own, or none.

    Each gets what it would with its adapter alone. Calls may be in training or not, compiled or not; the norms of all
    adapters are computed once per optimizer step. A backward pass may be run afterwards, but not one that repeats
    calls, as checkpoints do: that raises RuntimeError. An adapter that no sample has gets no gradient, so an optimizer
    leaves it alone; with Megatron's DistributedDataParallel it gets zeros, see below. Within the context the first of
    the adapters is the active one, for what works on that.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped. With Megatron's DistributedDataParallel,
            each adapter needs a wrapper that was made while it was active. Each rank adds zeros for adapters without
            samples, as another may have some; do not step an adapter that had none on any rank.
        ids: an adapter for each sample, or, in the shape of the token ids `[b, s]`, for each token: a list of names and
            of None for the base alone, or a list or tensor of numbers, which count `adapters`, and -1 for the base. A
            tensor on an accelerator is waited for. The same on all tensor-parallel ranks; of a context-parallel rank's
            own tokens. Layers take `[s, b, h]` in models with Megatron's, and `[b, s, h]` in others.
        adapters: names of those that batches choose among, all of the same layers; all adapters of the model by
            default. Batches of the same ones share compiled graphs, whatever their ids.

    Raises:
        ValueError: there is no such adapter or number, or none of the model; `ids` is no list or tensor of one or two
            dimensions; numbers are given without `adapters`; an adapter has other layers than another, or layers of
            routed experts; the model is merged, has its adapter switched off or is in a mixed batch; a wrapper for data
            parallelism does not reduce the gradients of all these adapters. A call raises where its input has another
            number of samples or tokens, or where gradients were enabled after the context was entered.
    """
    chunks = chunks_of(model)
    names = _names(chunks, adapters)
    batch = _Batch(names, _numbers_of(ids, names, given=adapters is not None))
    check_changeable(chunks)
    layers = [_layers_of(chunk, batch) for chunk in chunks]
    _check_wrappers(chunks, layers)
    name = f"mixed batch {next(_numbers)}"
    with ExitStack() as stack:
        for chunk, of_chunk in zip(chunks, layers, strict=True):
            stack.callback(_end, chunk, bank_of(chunk).active)
            _begin(chunk, of_chunk, batch, name)
        yield


class _Batch(NamedTuple):
    """Names of the adapters and, on the CPU, the number of each sample's or token's, `[b]` or `[b, s]`."""

    names: tuple[str, ...]
    numbers: torch.Tensor

    def on(self, device: torch.device, *, sequence_first: bool) -> torch.Tensor:
        """Return the numbers as layers take them."""
        is_turned = self.numbers.dim() == 2 and sequence_first
        return (self.numbers.t() if is_turned else self.numbers).to(device).contiguous()


def _names(chunks: Sequence[nn.Module], adapters: Sequence[str] | None) -> tuple[str, ...]:
    # Sorted, since the order in which the model has them changes with the active one.
    names = tuple(sorted(adapter_names(chunks)) if adapters is None else adapters)
    if not names:
        raise ValueError("adapters: found none, expected at least one adapter of the model")
    if isinstance(adapters, str) or len(set(names)) != len(names):
        raise ValueError(f"adapters: found {adapters!r}, expected a list of different names")
    for name in names:
        check_known(chunks, name)
    return names


def _numbers_of(ids: Any, names: tuple[str, ...], *, given: bool) -> torch.Tensor:
    """Return ids as int64 on the CPU, with the count of adapters for none."""
    expected = "expected a list or tensor of an adapter for each sample [b] or each token [b, s]"
    if isinstance(ids, torch.Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids: found a tensor of {ids.dtype}, expected one of integers")
        ids = ids.tolist()
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ValueError(f"ids: found {ids!r}, {expected}")
    rows = [row if isinstance(row, Sequence) and not isinstance(row, str) else None for row in ids]
    if not rows or len({None if row is None else len(row) for row in rows}) != 1 or rows[0] == []:
        raise ValueError(f"ids: found {ids!r}, {expected}")
    if rows[0] is None:
        return torch.tensor([_number(value, names, given) for value in ids])
    return torch.tensor([[_number(value, names, given) for value in row or ()] for row in rows])


def _number(value: Any, names: tuple[str, ...], given: bool) -> int:
    if value is None or (value == -1 and not isinstance(value, (bool, float))):
        return len(names)
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"ids: found {value!r}, expected one of {list(names)} or None")
        return names.index(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(names):
        raise ValueError(f"ids: found {value!r}, expected one of {list(names)}, its number from 0 on, -1 or None")
    if not given:
        raise ValueError(f"ids: found the number {value}, expected names, or `adapters`, the names that numbers count")
    return value


def _layers_of(chunk: nn.Module, batch: _Batch) -> list[tuple[DoRALinear, ...]]:
    """Return the wrappers of the batch's adapters on each layer of a chunk; raise if one has none on a layer."""
    bank, present = bank_of(chunk), sites_of(chunk)
    of_names = {name: present if name == bank.active else bank.inactive.get(name, []) for name in batch.names}
    on_layers = [{site.to_wrap: site for site in sites} for sites in of_names.values()]
    for (name, sites), own in zip(of_names.items(), on_layers, strict=True):
        check_places(chunk, name, [] if sites is present else sites)
        for layer, site in ((layer, site) for on_layer in on_layers for layer, site in on_layer.items()):
            if layer not in own:
                raise ValueError(
                    f"{site.path}: found no adapter {name!r} here and another of {list(batch.names)}, expected "
                    "adapters of the same layers in a mixed batch: pass `adapters`, the names of those that it may have"
                )
            if site.adapter.experts is not None:
                raise ValueError(
                    f"{site.path}: found an expert's layer, whose tokens a router has put in another order, expected "
                    "adapters of other layers in a mixed batch"
                )
    return [tuple(on_layer[layer] for on_layer in on_layers) for layer in on_layers[0]]


def _check_wrappers(chunks: Sequence[nn.Module], layers: Sequence[list[tuple[DoRALinear, ...]]]) -> None:
    """Raise ValueError if a wrapper for data parallelism would reduce the gradients of some of the adapters alone."""
    adapters = [site.adapter for of_chunk in layers for sites in of_chunk for site in sites]
    parameters = [p for each in adapters for p in each.parameters() if p.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError("model: found fully_shard, which knows one adapter, expected no mixed batches with it")
    is_reduced = {hasattr(parameter, "main_grad") for parameter in parameters}
    if is_reduced == {True}:
        return
    if len(is_reduced) > 1:
        raise ValueError(
            "model: found Megatron's DistributedDataParallel made for some of the batch's adapters, expected one for "
            "each, made while it was active: the gradients of the others would not be reduced"
        )
    for wrapper in data_parallel_around(chunks):
        if not reduces_all(wrapper, parameters):
            raise ValueError(
                f"model: found {type(wrapper).__name__}, which does not reduce the gradients of all adapters of the "
                "batch, expected Megatron's, one for each adapter and made while it was active"
            )


def _begin(chunk: nn.Module, layers: list[tuple[DoRALinear, ...]], batch: _Batch, name: str) -> None:
    bank = bank_of(chunk)
    if bank.active is not None:
        keep_bank(chunk, bank)
    for sites in layers:
        fit_to_base(sites)
        for site in sites:
            site.check_adapter(site.base_weight)
    make_active(chunk, batch.names[0])
    guard_changes(chunk, bank)
    bank.is_mixed = True
    bank.record.note_change(name)
    used = set(batch.numbers.flatten().tolist())
    sequence_first = _is_sequence_first(chunk)
    ids: dict[tuple[Any, str], tuple[torch.Tensor, torch.Tensor]] = {}
    for sites in layers:
        called = sites[0]
        device, tp_group = called.base_weight.device, called.adapter.tp_group
        if (device, tp_group) not in ids:
            whole = batch.on(device, sequence_first=sequence_first)
            ids[device, tp_group] = whole, _own_part(whole, tp_group)
        adapters = [MixedAdapter.of(site, bank.record, has_samples=number in used) for number, site in enumerate(sites)]
        called._mixture = SiteMixture(tuple(adapters), *ids[device, tp_group], sequence_first, torch.is_grad_enabled())


def _own_part(whole: torch.Tensor, tp_group: str) -> torch.Tensor:
    """Return this rank's part of a sequence of ids, as sequence parallelism has it of tokens; all ids of samples."""
    ranks = group_size(tp_group)
    # A sequence that cannot be shared equally is refused by the layers of sequence parallelism.
    if whole.dim() == 1 or ranks == 1 or whole.shape[0] % ranks:
        return whole
    return whole.chunk(ranks)[group_rank(tp_group)].contiguous()


def _end(chunk: nn.Module, active: str | None) -> None:
    bank = bank_of(chunk)
    for site in sites_of(chunk):
        site._mixture = None
    bank.is_mixed = False
    if active is not None:
        bank.record.note_change(active)
        make_active(chunk, active)


def _is_sequence_first(chunk: nn.Module) -> bool:
    """Return whether a model has Megatron's layers, which take `[s, b, h]` where others take `[b, s, h]`."""
    return any(type(module).__module__.startswith("megatron.") for module in chunk.modules())
