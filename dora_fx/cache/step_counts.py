"""Count, for each adapter, the optimizer's steps that may have changed it.

Every rank counts the same steps, so all ranks find the same values out of date after a step, without asking each other.
That is why steps are counted and bits are not compared: bits may change on one rank alone. The rule is never wrong
silently, since it errs on one side. A step counts for an adapter unless everything that the optimizer steps is known,
and is something else:

    steps of                                             count for
    parameters of adapters that are told apart           those adapters
    one of Megatron's optimizers, which steps copies     the adapters of all parameters that these are copies of, also
    or parts of buffers                                  of other ranks' parts
    anything else, or anything beside these              every adapter

What an optimizer does beyond its own parameters is like any other write, and found in the tensors (`freshness.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from dora_fx.megatron import parameters_changed_by


class StepCount:
    """The number of steps that may have changed the parameters of one adapter, of one model chunk."""

    def __init__(self) -> None:
        self.steps = 0


# Of adapters that are not told apart from others: all steps of the process.
_all_steps = StepCount()
# By parameter, for adapters of models that have several.
_counts = WeakTensorKeyDictionary()


def optimizer_steps() -> int:
    """Return how many steps all optimizers of this process have made."""
    return _all_steps.steps


def note_step_count(parameters: Iterable[torch.Tensor], count: StepCount) -> None:
    """Count the steps of an adapter's parameters, or of tensors that stand in for them, apart from those of others."""
    for parameter in parameters:
        _counts[parameter] = count


def step_count_of(parameter: torch.Tensor) -> StepCount:
    """Return the count of the adapter that a parameter belongs to."""
    count: StepCount = _counts.get(parameter, _all_steps)
    return count


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    _all_steps.steps += 1
    if _counts:
        for count in _counts_changed_by(optimizer):
            count.steps += 1


def _counts_changed_by(optimizer: torch.optim.Optimizer) -> set[StepCount]:
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [_counts.get(parameter) for parameter in stepped]
    if None in found:
        changed = parameters_changed_by(optimizer)
        if changed is None:
            return set(_counts.values())
        found = [_counts.get(parameter) for parameter in changed]
    # A parameter of the model beside its adapters has none.
    return {count for count in found if count is not None}


register_optimizer_step_post_hook(_count_step)
