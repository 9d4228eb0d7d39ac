"""Sharded state of Megatron's optimizers, where calling their own methods is not enough.

* A torch Adam has no state before its first step, and Megatron's ways of making it leave it unfit to step. Zero
  moments after zero steps are what it would make itself, so they are made here; nothing changes for the optimizer.
* Megatron's 16-bit optimizer numbers the parameters of a sharded state dict among the 16-bit ones, and those of its
  state among all. Magnitudes are float32 among 16-bit factors, so the numbers would not match.
* Megatron's distributed optimizer looks for a torch Adam's `step` among the loaded tensors, where it never is; and it
  gives all parameters one tensor to count in, which then counts every one of them.
* On a rank without adapters, such as that of a pipeline stage which has none, nothing counts the steps, and the lists
  of main copies are empty. Megatron's optimizers expect a count on every rank, and lists that merge with rank 0's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

# The one format of the distributed optimizer that may be loaded at any layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_MAIN_COPIES = "fp32_from_fp16_params"
_NO_PARAMETER = "the rank has no parameter"


class StepCount(NamedTuple):
    """How many steps an optimizer took, as Megatron's state dicts say it.

    Attributes:
        common: of all parameters, None where the groups count or nothing was counted yet.
        of_group: the value of the groups' `step`, None where they have none.
    """

    common: torch.Tensor | None
    of_group: Any


def sharded_state_dict(optimizer: Any, adapter: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """State of a Megatron optimizer, described as shards of global tensors. Every rank calls it.

    Args:
        adapter: sharded state dict of the adapters that it trains, holding the parameters themselves.
        is_loading: whether the state is about to be replaced.
    """
    for single in _single_optimizers(optimizer):
        _allocate_state(single.optimizer)
    metadata = dict(_METADATA, distrib_optim_fully_reshardable_mem_efficient=dist.get_backend() == "gloo")
    with _all_parameters_as_16_bit(optimizer), _own_steps(optimizer), _with_some_count(optimizer):
        state: dict[str, Any] = optimizer.sharded_state_dict(adapter, is_loading=is_loading, metadata=metadata)
    for single_state in _single_states(optimizer, state):
        _counted(single_state).get("state", {}).pop(_NO_PARAMETER, None)
        if _MAIN_COPIES in single_state:
            # By group and place: of lists, those that are empty here would be merged with another rank's.
            groups = enumerate(single_state.pop(_MAIN_COPIES))
            single_state[_MAIN_COPIES] = {index: dict(enumerate(group)) for index, group in groups if group}
    return state


def step_counts(optimizer: Any, state: dict[Any, Any]) -> list[StepCount | None]:
    """The steps that each of the chained optimizers took, None for one without a parameter on this rank.

    Args:
        state: of `sharded_state_dict`.
    """
    return [
        _step_count(_counted(single_state)) if single.get_parameters() else None
        for single, single_state in zip(_single_optimizers(optimizer), _single_states(optimizer, state), strict=True)
    ]


def set_step_counts(
    optimizer: Any, state: dict[Any, Any], counts_of_ranks: Sequence[Sequence[StepCount | None]]
) -> None:
    """Let this rank's state dict say how many steps were taken, if the rank has no parameter that counts them.

    Args:
        state: the part of `sharded_state_dict` that is not sharded.
        counts_of_ranks: `step_counts` of all ranks.
    """
    for index, single_state in enumerate(_single_states(optimizer, state)):
        known = next((counts[index] for counts in counts_of_ranks if counts[index] is not None), None)
        if known is None:
            continue
        common, of_group = known
        counted = _counted(single_state)
        if common is not None:
            counted.setdefault("state", {})["common_step"] = common
        for group in counted["param_groups"] if of_group is not None else ():
            group["step"] = of_group


def load_state(optimizer: Any, state: dict[Any, Any]) -> None:
    """Hand a loaded state dict to a Megatron optimizer."""
    singles = _single_optimizers(optimizer)
    states = _single_states(optimizer, state)
    distributed = [single_state.pop("param_state", None) for single_state in states]
    with _all_parameters_as_16_bit(optimizer), _own_steps(optimizer):
        for single, single_state in zip(singles, states, strict=True):
            if "param_state_sharding_type" not in single_state:
                # Megatron leaves out a count of zero, and a rank without parameters has no state.
                _counted(single_state).setdefault("state", {}).setdefault("common_step", torch.tensor(0.0))
            if isinstance(single, Float16OptimizerWithFloat16Params):
                loaded = single_state.get(_MAIN_COPIES, {})
                groups = enumerate(single.fp32_from_float16_groups)
                single_state[_MAIN_COPIES] = [[loaded[i][j] for j in range(len(group))] for i, group in groups]
        optimizer.load_state_dict(state)
    for single, tensors in zip(singles, distributed, strict=True):
        if tensors is not None:
            with _without_steps(single.optimizer):
                single.load_parameter_state_from_fully_reshardable(tensors)


def _single_optimizers(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _single_states(optimizer: Any, state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The states of the chained optimizers within the state of the chain."""
    number = len(_single_optimizers(optimizer))
    return [state] if number == 1 else [state[index] for index in range(number)]


def _counted(single_state: dict[str, Any]) -> dict[str, Any]:
    """The part that is torch's: groups, and the state of parameters."""
    found: dict[str, Any] = single_state.get("optimizer", single_state)
    return found


def _step_count(counted: dict[str, Any]) -> StepCount:
    of_groups = [group["step"] for group in counted["param_groups"] if "step" in group]
    return StepCount(counted.get("state", {}).get("common_step"), of_groups[0] if of_groups else None)


def _allocate_state(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }


@contextlib.contextmanager
def _own_steps(optimizer: Any) -> Iterator[None]:
    """At the end every parameter of torch's optimizers counts its steps in a tensor of its own."""
    try:
        yield
    finally:
        for single in _single_optimizers(optimizer):
            for state in single.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()


@contextlib.contextmanager
def _with_some_count(optimizer: Any) -> Iterator[None]:
    """Let each optimizer of torch's have a count of steps, also one without parameters on this rank."""
    lacking = [single.optimizer for single in _single_optimizers(optimizer) if not single.optimizer.state]
    try:
        for inner in lacking:
            inner.state[_NO_PARAMETER] = {"step": torch.tensor(0.0)}
        yield
    finally:
        for inner in lacking:
            inner.state.pop(_NO_PARAMETER, None)


@contextlib.contextmanager
def _without_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    steps = [(state, state.pop("step")) for state in optimizer.state.values() if "step" in state]
    try:
        yield
    finally:
        for state, step in steps:
            state["step"] = step


@contextlib.contextmanager
def _all_parameters_as_16_bit(optimizer: Any) -> Iterator[None]:
    """Let 16-bit optimizers take every parameter for one of theirs, a float32 one being its own main copy."""
    changed = [
        single
        for single in _single_optimizers(optimizer)
        if isinstance(single, Float16OptimizerWithFloat16Params) and any(single.fp32_from_fp32_groups)
    ]
    before = [(single.float16_groups, single.fp32_from_float16_groups) for single in changed]
    try:
        for single in changed:
            models = {
                id(main): model
                for models, mains in zip(single.float16_groups, single.fp32_from_float16_groups, strict=True)
                for model, main in zip(models, mains, strict=True)
            }
            mains = [group["params"] for group in single.optimizer.param_groups]
            single.float16_groups = [[models.get(id(main), main) for main in group] for group in mains]
            single.fp32_from_float16_groups = mains
        yield
    finally:
        for single, groups in zip(changed, before, strict=True):
            single.float16_groups, single.fp32_from_float16_groups = groups
