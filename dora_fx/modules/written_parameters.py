"""Notice at an optimizer's step that somebody wrote into adapters of which it steps float32 copies.

Loaders of this package write the copies as well (`update_main_copies`). `load_state_dict` is torch's, so its values are
taken over at the next step. Whatever else wrote, through `.data` or not, is an error before the step takes it back.
Looked at are all adapters that the optimizer trains, or this rank's parts of them, at each of its steps:

    step of Megatron's optimizer    gradients are ready
      step of torch's inside it     compare, raise; then the copies are stepped
      copies into parameters        the values before the step are gone
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

# Found once for each optimizer. A copy refers to no optimizer, which would live on otherwise.
_copies: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[MainCopy]] = weakref.WeakKeyDictionary()
_loaded = WeakTensorKeyDictionary()


class OverwrittenParametersError(RuntimeError):
    """An optimizer is about to take back what was written into an adapter, or to change nothing of it."""


def note_loaded(parameters: Iterable[nn.Parameter]) -> None:
    """Let the next step go on from what these parameters hold, and not from the float32 copies."""
    for parameter in parameters:
        _loaded[parameter] = True


@functools.cache
def guard_optimizers() -> None:
    """From the first adapter of a process on, refuse steps that would undo a write or miss the adapter."""
    register_optimizer_step_pre_hook(_take_over_or_refuse)


@torch.no_grad()
def _take_over_or_refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
    copies = _adapters_stepped_by(optimizer)
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
        if copy.parameter not in _loaded:
            raise OverwrittenParametersError(
                f"{name_of(copy.parameter)}: found other values than the optimizer's float32 copy has ({len(written)} "
                "such parameters), and this step would write the copy back; expected reload_model_params() of "
                "Megatron's optimizer after a write into parameters that it trains in 16 bits"
            )
    write(written)
    for copy in copies:
        _loaded.pop(copy.parameter, None)


def _adapters_stepped_by(optimizer: torch.optim.Optimizer) -> list[MainCopy]:
    """The adapters' parameters, or parts of them, that an optimizer steps copies or views of."""
    found = _copies.get(optimizer)
    if found is None:
        # Megatron's groups say whether they are of experts. A look among all objects takes a while.
        is_megatrons = any("is_expert_parallel" in group for group in optimizer.param_groups)
        found = [copy for copy in copies_stepped_by(optimizer) if name_of(copy.parameter)] if is_megatrons else []
        _copies[optimizer] = found
    return found
