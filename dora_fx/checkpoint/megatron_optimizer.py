"""Sharded state of Megatron's optimizers, with workarounds for what their own methods do not handle:

* A torch Adam has no state before its first step, and after Megatron's ways of allocating it the optimizer cannot step.
  So the state is allocated here: zero moments and zero steps, which is what Adam itself would allocate.
* Megatron's 16-bit optimizer numbers the parameters of a sharded state dict among the 16-bit ones, but the parameters
  of its state among all. Magnitudes are float32 and factors are 16-bit, so the numbers would not match.
* Megatron's distributed optimizer looks for a torch Adam's `step` among the loaded tensors, where it never is. It also
  gives all parameters the same tensor as their `step`, which each of them then increments.
* Where experts alone are adapted, a chain has an optimizer without torch's, which cannot be saved and is left out.
* On a rank without adapters, such as a pipeline stage that has none, nothing counts the steps and the lists of main
  copies are empty. Megatron's optimizers expect a count on every rank, and lists that can be merged with rank 0's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from dora_fx.checkpoint.optimizer_chain import of_torch, single_optimizers, single_states

# The only format of the distributed optimizer that can be loaded at any layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_MAIN_COPIES = "fp32_from_fp16_params"
_NO_PARAMETER = "the rank has no parameter"


class StepCount(NamedTuple):
    """The number of steps that an optimizer took, in the two forms of Megatron's state dicts.

    Attributes:
        common: count for all parameters; None where the groups count, or before the first step.
        of_group: value of the groups' `step`; None where they have none.
    """

    common: torch.Tensor | None
    of_group: Any


def sharded_state_dict(optimizer: Any, adapter: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Return the state of a Megatron optimizer as shards of global tensors. Every rank calls it.

    Args:
        optimizer: Megatron's, chained or single.
        adapter: sharded state dict of the adapters that it trains, with the parameters themselves as data.
        is_loading: whether the state is about to be replaced.
    """
    for single in single_optimizers(optimizer):
        _allocate_state(single.optimizer)
    # Megatron's default gathers the state with NCCL, which a run on CPUs does not have.
    metadata = dict(_METADATA, distrib_optim_fully_reshardable_mem_efficient=dist.get_backend() == "gloo")
    with (
        _without_idle(optimizer),
        _all_parameters_as_16_bit(optimizer),
        _own_steps(optimizer),
        _with_some_count(optimizer),
    ):
        state: dict[str, Any] = optimizer.sharded_state_dict(adapter, is_loading=is_loading, metadata=metadata)
    for single_state in single_states(optimizer, state):
        of_torch(single_state).get("state", {}).pop(_NO_PARAMETER, None)
        if _MAIN_COPIES in single_state:
            # Dicts by group and index: Megatron merges lists of ranks by position, and those of this rank may be empty.
            groups = enumerate(single_state.pop(_MAIN_COPIES))
            single_state[_MAIN_COPIES] = {index: dict(enumerate(group)) for index, group in groups if group}
    return state


def step_counts(optimizer: Any, state: dict[Any, Any]) -> list[StepCount | None]:
    """Return the steps that each of the chained optimizers took; None for one without parameters on this rank.

    Args:
        optimizer: Megatron's.
        state: from `sharded_state_dict`.
    """
    return [
        _step_count(of_torch(single_state)) if single.get_parameters() else None
        for single, single_state in zip(single_optimizers(optimizer), single_states(optimizer, state), strict=True)
    ]


def set_step_counts(
    optimizer: Any, state: dict[Any, Any], counts_of_ranks: Sequence[Sequence[StepCount | None]]
) -> None:
    """Write the step counts into this rank's state dict, from the first rank that has parameters.

    Rank 0's state dict is the one that is saved, and rank 0 may be a pipeline stage without adapters.

    Args:
        optimizer: Megatron's.
        state: the part of `sharded_state_dict` that is not sharded.
        counts_of_ranks: `step_counts` of all ranks.
    """
    for index, single_state in enumerate(single_states(optimizer, state)):
        known = next((counts[index] for counts in counts_of_ranks if counts[index] is not None), None)
        if known is None:
            continue
        common, of_group = known
        torchs = of_torch(single_state)
        if common is not None:
            torchs.setdefault("state", {})["common_step"] = common
        for group in torchs["param_groups"] if of_group is not None else ():
            group["step"] = of_group


def load_state(optimizer: Any, state: dict[Any, Any]) -> None:
    """Load a state dict, as `read_state` returns it, into a Megatron optimizer."""
    singles = single_optimizers(optimizer)
    states = single_states(optimizer, state)
    distributed = [single_state.pop("param_state", None) for single_state in states]
    with _without_idle(optimizer), _all_parameters_as_16_bit(optimizer), _own_steps(optimizer):
        for single, single_state in zip(singles, states, strict=True):
            if "param_state_sharding_type" not in single_state:
                # Megatron leaves a count of zero out, and fails without one.
                of_torch(single_state).setdefault("state", {}).setdefault("common_step", torch.tensor(0.0))
            if isinstance(single, Float16OptimizerWithFloat16Params):
                loaded = single_state.get(_MAIN_COPIES, {})
                groups = enumerate(single.fp32_from_float16_groups)
                single_state[_MAIN_COPIES] = [[loaded[i][j] for j in range(len(group))] for i, group in groups]
        optimizer.load_state_dict(state)
    for single, tensors in zip(singles, distributed, strict=True):
        if tensors is not None:
            with _without_steps(single.optimizer):
                single.load_parameter_state_from_fully_reshardable(tensors)


@contextlib.contextmanager
def _without_idle(optimizer: Any) -> Iterator[None]:
    """Within the block, leave the optimizers that have nothing to train on any rank out of a chain."""
    if not hasattr(optimizer, "chained_optimizers"):
        yield
        return
    chained = optimizer.chained_optimizers
    optimizer.chained_optimizers = single_optimizers(optimizer)
    try:
        yield
    finally:
        optimizer.chained_optimizers = chained


def _step_count(torchs: dict[str, Any]) -> StepCount:
    of_groups = [group["step"] for group in torchs["param_groups"] if "step" in group]
    return StepCount(torchs.get("state", {}).get("common_step"), of_groups[0] if of_groups else None)


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
    """Give every parameter of torch's optimizers a `step` tensor of its own at the end of the block.

    Megatron's methods leave one tensor for all, which a step would then increment once for each parameter.
    """
    try:
        yield
    finally:
        for single in single_optimizers(optimizer):
            for state in single.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()


@contextlib.contextmanager
def _with_some_count(optimizer: Any) -> Iterator[None]:
    """Within the block, give torch's optimizers without parameters on this rank a count of zero steps."""
    lacking = [single.optimizer for single in single_optimizers(optimizer) if not single.optimizer.state]
    try:
        for inner in lacking:
            inner.state[_NO_PARAMETER] = {"step": torch.tensor(0.0)}
        yield
    finally:
        for inner in lacking:
            inner.state.pop(_NO_PARAMETER, None)


@contextlib.contextmanager
def _without_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, hide each parameter's `step`, which the distributed optimizer would look for in the file."""
    steps = [(state, state.pop("step")) for state in optimizer.state.values() if "step" in state]
    try:
        yield
    finally:
        for state, step in steps:
            state["step"] = step


@contextlib.contextmanager
def _all_parameters_as_16_bit(optimizer: Any) -> Iterator[None]:
    """Within the block, list every parameter as a 16-bit one; a float32 parameter is its own main copy.

    Then Megatron numbers the parameters of the state dict and of the state in the same way.
    """
    changed = [
        single
        for single in single_optimizers(optimizer)
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
