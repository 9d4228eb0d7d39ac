"""The adapters of a model chunk by name, of which one is in the model.

Each adapter has wrappers of its own around the base layers that it adapts, with its parameters and what is cached of
them. Those of the active adapter are in the model. The others are kept beside it: they are in no state dict, no
optimizer and no data-parallel buffer that is made of the model. To change the adapter is to put other wrappers in the
places, so nothing is computed again, and compiled graphs stay those of the wrappers' classes and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dora_fx.cache import ActiveAdapterRecord, StepCount, note_adapter, raise_if_other
from dora_fx.megatron import replace_modules, unwrap, walk
from dora_fx.modules.linear_wrapper import DoRALinear

# PEFT's name for an adapter that was given none.
DEFAULT_NAME = "default"
_BANK = "_dora_fx_adapters"


@dataclass
class AdapterBank:
    """The adapters of one chunk.

    Attributes:
        active: name of the adapter in the chunk, which may have no layer there; None before there is one.
        inactive: wrappers of the others, by name, in the order in which they were added.
        record: when which of them was active.
        is_mixed: a mixed batch is under way, in the wrappers of the active adapter.
    """

    active: str | None
    inactive: dict[str, list[DoRALinear]] = field(default_factory=dict)
    record: ActiveAdapterRecord = field(init=False)
    is_mixed: bool = False

    def __post_init__(self) -> None:
        self.record = ActiveAdapterRecord(self.active or "")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all adapters, the active one first."""
        return (*(() if self.active is None else (self.active,)), *self.inactive)


def bank_of(chunk: nn.Module) -> AdapterBank:
    """Return the bank of a chunk, bare or wrapped; one that was adapted without a name has the name of PEFT."""
    bank: AdapterBank | None = getattr(unwrap(chunk), _BANK, None)
    return bank or AdapterBank(DEFAULT_NAME if sites_of(chunk) else None)


def keep_bank(chunk: nn.Module, bank: AdapterBank | None) -> None:
    """Keep a bank with its chunk, whose copies and pickles have it too; None is for a chunk without adapters."""
    module = unwrap(chunk)
    if bank is not None:
        setattr(module, _BANK, bank)
    elif hasattr(module, _BANK):
        delattr(module, _BANK)


def path_of_inner_bank_maybe(chunk: nn.Module) -> str | None:
    """Return the path of a part of a chunk that adapters were added to as to a model of its own."""
    return next((named.path for named in walk(chunk) if named.path and hasattr(named.module, _BANK)), None)


def inactive_adapters(chunks: Iterable[nn.Module]) -> list[str]:
    """Return the names of the adapters that are kept beside chunks."""
    return list(dict.fromkeys(name for chunk in chunks for name in bank_of(chunk).inactive))


def sites_of(chunk: nn.Module) -> list[DoRALinear]:
    """Return the wrappers that are in a chunk."""
    return [named.module for named in walk(chunk, DoRALinear) if isinstance(named.module, DoRALinear)]


def take_out(chunk: nn.Module) -> list[DoRALinear]:
    """Put the base layers in the places of the active adapter's wrappers, which are returned."""
    sites = sites_of(chunk)
    replace_modules(chunk, {site: site.to_wrap for site in sites})
    return sites


def check_places(chunk: nn.Module, name: str, sites: Iterable[DoRALinear]) -> None:
    """Raise ValueError, naming the layer, if a base layer of inactive wrappers is not in the chunk any more."""
    layers = set(chunk.modules())
    for site in sites:
        if site.to_wrap not in layers:
            raise ValueError(
                f"{site.path}: found another layer in the place of the one that adapter {name!r} was added to, "
                "expected that one: replace layers before adapters are added, or call delete_adapter"
            )


def fit_to_base(sites: Iterable[DoRALinear]) -> None:
    """Give inactive wrappers the dtype and device that their base layers have."""
    for site in sites:
        weight, lora_a = site.base_weight, site.adapter.linear_in.weight
        if lora_a.dtype != weight.dtype or lora_a.device != weight.device:
            # The adapter's own cast keeps the magnitude in float32.
            site.adapter.to(device=weight.device, dtype=weight.dtype)
            site.invalidate_norm()


def put_in(chunk: nn.Module, sites: Sequence[DoRALinear]) -> None:
    """Put wrappers that fit in the places of their base layers, in the mode of these."""
    for site in sites:
        site.train(site.to_wrap.training)
    replace_modules(chunk, {site.to_wrap: site for site in sites})


def guard_changes(chunk: nn.Module, bank: AdapterBank) -> None:
    """Have calls that a backward pass repeats checked, in the active adapter's layers and in those that it leaves bare.

    Without a second adapter nothing is checked.
    """
    adapted = sites_of(chunk)
    for site in adapted:
        note_adapter(site.adapter.linear_in.weight, bank.record)
    bases = {site.to_wrap for sites in bank.inactive.values() for site in sites}
    for _, path, module in walk(chunk, DoRALinear):
        _unguard(module)
        if module in bases:
            module.register_forward_pre_hook(_BareLayerGuard(path, bank.record))
    for site in adapted:
        _unguard(site.to_wrap)


def count_steps_apart(chunk: nn.Module, bank: AdapterBank) -> None:
    """Have the steps of each adapter counted by itself, so that they leave what is cached of the others up to date."""
    for sites in (sites_of(chunk), *bank.inactive.values()):
        count = StepCount()
        for site in sites:
            if site.step_count is None:
                site.count_steps(count)


def _unguard(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _BareLayerGuard):
            del module._forward_pre_hooks[key]


@dataclass
class _BareLayerGuard:
    """A forward pre-hook of a layer that the active adapter leaves bare, and another one of the chunk's adapts."""

    path: str
    record: ActiveAdapterRecord

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Other layers of a compiled region are checked in front of it.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise_if_other(self.path, self.record)
