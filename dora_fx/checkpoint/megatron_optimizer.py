"""Sharded state of Megatron's optimizers, where calling their own methods is not enough.

* A torch Adam has no state before its first step, and Megatron's ways of making it leave it unfit to step. Zero
  moments after zero steps are what it would make itself, so they are made here; nothing changes for the optimizer.
* Megatron's 16-bit optimizer numbers the parameters of a sharded state dict among the 16-bit ones, and those of its
  state among all. Magnitudes are float32 among 16-bit factors, so the numbers would not match.
* Megatron's distributed optimizer looks for a torch Adam's `step` among the loaded tensors, where it never is; and it
  gives all parameters one tensor to count in, which then counts every one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

# The one format of the distributed optimizer that may be loaded at any layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state_dict(optimizer: Any, adapter: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """State of a Megatron optimizer, described as shards of global tensors. Every rank calls it.

    Args:
        adapter: sharded state dict of the adapters that it trains, holding the parameters themselves.
        is_loading: whether the state is about to be replaced.
    """
    for single in _single_optimizers(optimizer):
        _allocate_state(single.optimizer)
    metadata = dict(_METADATA, distrib_optim_fully_reshardable_mem_efficient=dist.get_backend() == "gloo")
    with _all_parameters_as_16_bit(optimizer), _own_steps(optimizer):
        return optimizer.sharded_state_dict(adapter, is_loading=is_loading, metadata=metadata)


def load_state(optimizer: Any, state: dict[Any, Any]) -> None:
    """Hand a loaded state dict to a Megatron optimizer."""
    singles = _single_optimizers(optimizer)
    states = [state] if len(singles) == 1 else [state[index] for index in range(len(singles))]
    distributed = [single_state.pop("param_state", None) for single_state in states]
    for single_state in states:
        counted = single_state.get("optimizer", single_state)
        if "state" in counted:
            # Megatron leaves out a count of zero.
            counted["state"].setdefault("common_step", torch.tensor(0.0))
    with _all_parameters_as_16_bit(optimizer), _own_steps(optimizer):
        optimizer.load_state_dict(state)
    for single, tensors in zip(singles, distributed, strict=True):
        if tensors is not None:
            with _without_steps(single.optimizer):
                single.load_parameter_state_from_fully_reshardable(tensors)


def _single_optimizers(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


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
