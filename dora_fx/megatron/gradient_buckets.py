"""The buckets in which Megatron's DistributedDataParallel reduces gradients over data-parallel ranks.

Whatever starts a reduction, `finalize_model_grads`, the last gradient of an overlapped bucket or a pipeline schedule's
`grad_sync_func`, calls `start_grad_sync` of a bucket group, and `zero_grad_buffer` calls its `reset` (read in
megatron-core 0.16 to 0.19). Neither has a hook of its own, so the two methods of a group are replaced on the object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dora_fx.megatron.data_parallel import data_parallel_objects

# The wrappers found so far. Every parameter asks for its own, and a search among all objects of the process is slow.
_wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()

ParametersHook = Callable[[Sequence[nn.Parameter]], None]


class GradientBucket(NamedTuple):
    """The place where Megatron's wrapper keeps and reduces the gradient of one parameter.

    Attributes:
        wrapper: the DistributedDataParallel, which this does not keep alive.
    """

    wrapper: weakref.ref[Any]

    def is_gone(self) -> bool:
        """Return whether nothing reduces the gradient any more."""
        return self.wrapper() is None

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters whose gradients the wrapper reduces."""
        wrapper = self.wrapper()
        return [] if wrapper is None else list(wrapper.param_to_bucket_group)

    def register_ready(self, parameter: nn.Parameter) -> None:
        """Tell an overlapped reduction that the parameter has its gradient of a backward pass."""
        wrapper = self.wrapper()
        if wrapper is not None and wrapper.ddp_config.overlap_grad_reduce:
            wrapper.param_to_bucket_group[parameter].register_grad_ready(parameter, wrapper.force_all_reduce)


def find_bucket_maybe(
    parameter: nn.Parameter, *, before_reduction: ParametersHook, after_reset: ParametersHook
) -> GradientBucket | None:
    """Return the bucket that reduces a parameter's gradient, with hooks on its group; None if there is none.

    Args:
        before_reduction: called with the group's parameters, in an order that is the same on all ranks, before their
            gradients are read.
        after_reset: called with them after their gradients were set to zero for a new step.
    """
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        return None
    reduced = getattr(parameter, "main_grad_copy_in_grad_buffer", main_grad)
    known = _group_of_maybe(_wrappers, parameter, reduced)
    if known is None:
        _wrappers.update(data_parallel_objects())
        known = _group_of_maybe(_wrappers, parameter, reduced)
    if known is None:
        return None
    wrapper, group = known
    _hook(group, before_reduction, after_reset)
    return GradientBucket(weakref.ref(wrapper))


def _group_of_maybe(
    wrappers: Iterable[nn.Module], parameter: nn.Parameter, reduced: torch.Tensor
) -> tuple[Any, Any] | None:
    """Return the wrapper and the bucket group in whose memory a gradient is.

    The memory decides, since wrappers that were around the model before may still hold the parameter.
    """
    for wrapper in list(wrappers):
        group: Any = getattr(wrapper, "param_to_bucket_group", {}).get(parameter)
        if group is not None:
            buffer = group.param_to_bucket[parameter].grad_data
            if buffer.untyped_storage()._cdata == reduced.untyped_storage()._cdata:
                return wrapper, group
    return None


def _hook(group: Any, before_reduction: ParametersHook, after_reset: ParametersHook) -> None:
    # Every parameter of the group comes here, and one hook serves them all.
    if hasattr(group.start_grad_sync, "dora_fx_hook"):
        return
    start_grad_sync, reset = group.start_grad_sync, group.reset
    parameters = [parameter for bucket in group.buckets for parameter in bucket.params_list]

    def start_after_hook(*args: Any, **kwargs: Any) -> Any:
        before_reduction(parameters)
        return start_grad_sync(*args, **kwargs)

    def reset_and_hook(*args: Any, **kwargs: Any) -> Any:
        result = reset(*args, **kwargs)
        after_reset(parameters)
        return result

    start_after_hook.dora_fx_hook = True  # type: ignore[attr-defined]
    group.start_grad_sync, group.reset = start_after_hook, reset_and_hook
