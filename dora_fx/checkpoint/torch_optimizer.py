"""State of torch optimizers at any layout: AdamW, SGD and others that keep numbers and tensors of a parameter's shape.

A tensor is sharded as its parameter is, under a key with the parameter's name in the whole model. Numbers such as each
parameter's `step`, hyper-parameters and the members of the groups are metadata: plain values, the same on every rank.
An optimizer has no state before its first step, nor for parameters that got no gradient, so a load asks for the tensors
that the checkpoint holds and not for those that the optimizer has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from dora_fx.attach import adapted_layers
from dora_fx.checkpoint.manifest import StoredTensor
from dora_fx.checkpoint.plain_values import from_plain, to_plain
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.megatron import walk
from dora_fx.modules import ParallelLinearDoRAAdapter

_KEY = re.compile(r"optimizer\.state\.(\w+)\.(.+)")
# Entries of a parameter group that are no hyper-parameters.
_MEMBERS = ("params", "param_names")


@dataclass(frozen=True)
class AdapterParameter:
    """A parameter of an adapter: its name within the adapter, and the path of its layer in the whole model."""

    path: str
    local_name: str
    adapter: ParallelLinearDoRAAdapter

    @property
    def name(self) -> str:
        """Name in the whole model."""
        return f"{self.path}.adapter.{self.local_name}"

    def shard(self, kind: str, tensor: torch.Tensor) -> Any:
        """Make a shard of the whole tensor from this rank's tensor of the parameter's shape."""
        prefix = f"optimizer.state.{kind}.{self.path}.adapter."
        # Other ranks hold copies of an expert than of a dense layer.
        is_dense = self.adapter.experts is None
        copies = None if is_dense else {"dp_cp_group": parallel_state.get_expert_data_parallel_group()}
        [shard] = self.adapter.shards_of({self.local_name: tensor}, prefix, metadata=copies).values()
        return shard


def state_to_save(
    optimizer: torch.optim.Optimizer, chunks: Sequence[nn.Module]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return this rank's shards, by parameter and kind of state, and its part of the metadata.

    Raises:
        CheckpointError: the optimizer trains other parameters than adapters, or has state that cannot be resharded.
    """
    known = _adapter_parameters(chunks)
    shards: dict[str, dict[str, Any]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter in _parameters(optimizer):
        # Not `state[parameter]`: the state is a defaultdict, which would get an entry.
        state = optimizer.state.get(parameter, {})
        if parameter not in known:
            if parameter.requires_grad or state:
                raise CheckpointError(
                    f"{_name_of(parameter, chunks)}: found it in {type(optimizer).__name__}, expected adapters alone; "
                    "give other parameters an optimizer of their own"
                )
            continue
        of = known[parameter]
        for kind, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and re.fullmatch(r"\w+", kind):
                shards.setdefault(of.name, {})[kind] = of.shard(kind, value)
            else:
                numbers.setdefault(of.name, {})[kind] = _plain_state(optimizer, of.name, kind, value)
    return shards, {"class": _class_of(optimizer), "groups": _groups(optimizer, known), "numbers": numbers}


def join_metadata(metadata_of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the metadata of all ranks into that of the whole optimizer.

    Raises:
        CheckpointError: ranks that should agree do not; the message names the first one that differs from rank 0.
    """
    first = metadata_of_ranks[0]
    members: list[dict[str, None]] = [{} for _ in first["groups"]]
    numbers: dict[str, dict[str, Any]] = {}
    for rank, own in enumerate(metadata_of_ranks):
        settings = [[part["class"], [group["settings"] for group in part["groups"]]] for part in (own, first)]
        if settings[0] != settings[1]:
            raise CheckpointError(
                f"optimizer: found {settings[0]} on rank {rank} and {settings[1]} on rank 0, expected the same "
                "class, and groups with the same hyper-parameters, on every rank"
            )
        # Each pipeline stage has parameters of its own, and a group has those of all stages.
        for names, group in zip(members, own["groups"], strict=True):
            names |= dict.fromkeys(group["parameters"])
        for name, values in own["numbers"].items():
            if numbers.setdefault(name, values) != values:
                raise CheckpointError(
                    f"{name}: found optimizer state {values} on rank {rank} and {numbers[name]} on an earlier rank, "
                    "expected the same numbers on every rank that has the parameter"
                )
    groups = [
        {"settings": group["settings"], "parameters": sorted(names)}
        for group, names in zip(first["groups"], members, strict=True)
    ]
    return {"class": first["class"], "groups": groups, "numbers": dict(sorted(numbers.items()))}


def state_to_load(
    optimizer: torch.optim.Optimizer, chunks: Sequence[nn.Module], stored: Mapping[str, StoredTensor]
) -> dict[str, dict[str, Any]]:
    """Return empty shards for the state that a checkpoint stores of the optimizer's parameters."""
    kinds: dict[str, dict[str, str]] = {}
    for key, tensor in stored.items():
        if match := _KEY.fullmatch(key):
            kinds.setdefault(match[2], {})[match[1]] = tensor.dtype
    known = _adapter_parameters(chunks)
    own = [(known[parameter], parameter) for parameter in _parameters(optimizer) if parameter in known]
    return {
        of.name: {
            kind: of.shard(kind, torch.empty(parameter.shape, dtype=getattr(torch, dtype)))
            for kind, dtype in kinds[of.name].items()
        }
        for of, parameter in own
        if of.name in kinds
    }


def check_metadata(optimizer: torch.optim.Optimizer, chunks: Sequence[nn.Module], metadata: dict[str, Any]) -> None:
    """Raise CheckpointError unless the optimizer has the class and the parameter groups of the saved one."""
    if metadata["class"] != _class_of(optimizer):
        raise CheckpointError(
            f"found the state of a {metadata['class']}, expected that of a {_class_of(optimizer)}, the optimizer given"
        )
    known = _adapter_parameters(chunks)
    saved, own = metadata["groups"], _groups(optimizer, known)
    if len(saved) != len(own):
        raise CheckpointError(f"found {len(saved)} parameter groups, expected the {len(own)} of the optimizer given")
    for number, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        # The saved groups have the parameters of all ranks; this rank compares its own.
        here = set(theirs["parameters"]) & {of.name for of in known.values()}
        differing = sorted(here ^ set(ours["parameters"]))
        if differing:
            holder = "saved optimizer" if differing[0] in here else "optimizer given"
            raise CheckpointError(
                f"{differing[0]} ({len(differing)} such parameters): found in parameter group {number} of the {holder} "
                "alone, expected the same groups"
            )


def load_state(
    optimizer: torch.optim.Optimizer,
    chunks: Sequence[nn.Module],
    metadata: dict[str, Any],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Load state into an optimizer that passed `check_metadata`."""
    known = _adapter_parameters(chunks)
    state: dict[int, dict[str, Any]] = {}
    parameters = list(_parameters(optimizer))
    for index, parameter in enumerate(parameters):
        if parameter in known:
            name = known[parameter].name
            numbers = {kind: from_plain(value) for kind, value in metadata["numbers"].get(name, {}).items()}
            state[index] = numbers | dict(tensors.get(name, {}))
    # The members stay the optimizer's own: it has this rank's parameters, and the saved groups have all.
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, metadata["groups"], strict=True):
        members = {name: group[name] for name in _MEMBERS if name in group}
        settings = {name: from_plain(value, like=group.get(name)) for name, value in saved["settings"].items()}
        group.clear()
        group.update(settings | members)
    optimizer.load_state_dict({"state": {i: values for i, values in state.items() if values}, "param_groups": groups})
    for index, values in state.items():
        # torch casts loaded state to the parameter's dtype. An optimizer may keep state in another one, which is
        # restored.
        own = optimizer.state[parameters[index]] if values else {}
        for kind, value in values.items():
            if isinstance(value, torch.Tensor) and own[kind].dtype != value.dtype:
                own[kind] = value.to(own[kind].device)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _adapter_parameters(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, AdapterParameter]:
    return {
        parameter: AdapterParameter(named.whole_path, name, named.module.adapter)
        for _, named in adapted_layers(chunks)
        for name, parameter in named.module.adapter.named_parameters()
    }


def _groups(optimizer: torch.optim.Optimizer, known: Mapping[nn.Parameter, AdapterParameter]) -> list[dict[str, Any]]:
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        settings = {}
        for name, value in group.items():
            if name not in _MEMBERS:
                try:
                    settings[name] = to_plain(value)
                except TypeError as error:
                    raise CheckpointError(
                        f"parameter group {number} of {type(optimizer).__name__}: {name} is {error}, expected numbers "
                        "and text"
                    ) from error
        names = [known[parameter].name for parameter in group["params"] if parameter in known]
        groups.append({"settings": settings, "parameters": names})
    return groups


def _plain_state(optimizer: torch.optim.Optimizer, name: str, kind: str, value: Any) -> Any:
    try:
        return to_plain(value)
    except TypeError as error:
        raise CheckpointError(
            f"{name}: the state {kind!r} of {type(optimizer).__name__} is {error}, expected tensors of the parameter's "
            "shape and single numbers, which can be moved to another layout; save without `optimizer`"
        ) from error


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _name_of(parameter: nn.Parameter, chunks: Sequence[nn.Module]) -> str:
    for chunk in chunks:
        for _, path, module in walk(chunk):
            for name, own in module.named_parameters(recurse=False):
                if own is parameter:
                    return f"{path}.{name}"
    return f"a parameter of shape {tuple(parameter.shape)} that the model does not have"
