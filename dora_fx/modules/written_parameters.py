"""Raise at an optimizer's step if an adapter was written to while the optimizer steps a float32 copy of it.

The step would overwrite the adapter with the copy. Loaders of this package write the copies as well
(`update_main_copies`). `load_state_dict` is torch's and does not, so what it loaded is copied into the float32 copies
at the next step. After any other write, through `.data` or not, the step raises before it changes anything. Each step
of an optimizer compares all adapters that it trains, or this rank's parts of them, with the copies:

    step of Megatron's optimizer    gradients are ready
      step of torch's inside it     compare, raise; then step the copies
      copies into parameters        what was written before the step is overwritten
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from dora_fx.megatron import MainCopy, copies_stepped_by, differing, write
from dora_fx.modules.site_paths import name_of

# The search walks all objects of the process, so it is done once for each optimizer. A `MainCopy` does not refer to its
# optimizer: this dictionary would keep the optimizer alive otherwise.
_copies: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[MainCopy]] = weakref.WeakKeyDictionary()
# Parameters that `load_state_dict` wrote since the last step.
_loaded_parameters = WeakTensorKeyDictionary()


class OverwrittenParametersError(RuntimeError):
    """An optimizer's step would overwrite what was written into an adapter, or would not change the adapter."""


def note_loaded(parameters: Iterable[nn.Parameter]) -> None:
    """Have the next step continue from the values of these parameters, and not from their float32 copies."""
    for parameter in parameters:
        _loaded_parameters[parameter] = True


@functools.cache
def guard_optimizers() -> None:
    """Refuse steps that would overwrite a write or miss the adapter, from the first adapter of a process on."""
    register_optimizer_step_pre_hook(_take_over_or_refuse)


@torch.no_grad()
def _take_over_or_refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
    copies = _adapters_stepped_by(optimizer)
    # A comparison waits for the device, which the capture of a CUDA graph forbids.
    if not copies or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    for copy in copies:
        if not copy.is_reached():
            raise OverwrittenParametersError(
                f"{name_of(copy.parameter)}: found it outside the buffer of Megatron's DistributedDataParallel that "
                "the optimizer's step writes into, so the step would not change it; expected no cast, move or new "
                "tensor for the parameter after the wrapper and the optimizer were made"
            )
    written = differing(copies)
    for copy in written:
        if copy.parameter not in _loaded_parameters:
            raise OverwrittenParametersError(
                f"{name_of(copy.parameter)}: found other values than the optimizer's float32 copy has ({len(written)} "
                "such parameters), and this step would write the copy back; expected reload_model_params() of "
                "Megatron's optimizer after a write into parameters that it trains in 16 bits"
            )
    write(written)
    for copy in copies:
        _loaded_parameters.pop(copy.parameter, None)


def _adapters_stepped_by(optimizer: torch.optim.Optimizer) -> list[MainCopy]:
    """Return the copies or views of adapter parameters, or of parts of them, that an optimizer steps."""
    found = _copies.get(optimizer)
    if found is None:
        # Megatron alone writes this key into groups. The search among all objects is too slow for others' optimizers.
        is_megatrons = any("is_expert_parallel" in group for group in optimizer.param_groups)
        found = [copy for copy in copies_stepped_by(optimizer) if name_of(copy.parameter)] if is_megatrons else []
        _copies[optimizer] = found
    return found
