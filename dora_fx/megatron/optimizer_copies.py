"""The float32 copies of parameters that Megatron's 16-bit optimizers step, in place of the parameters.

    Float16OptimizerWithFloat16Params   a whole copy of each 16-bit parameter
    DistributedOptimizer                copies of this rank's parts of 16-bit parameters, and views of its parts of
                                        float32 parameters

A step ends with the copies rounded into the parameters, or into the buffer that the parameters are views of. So it
overwrites what was written into parameters alone, and does not change a parameter that is no view of the buffer any
more. Read in megatron-core 0.16 to 0.19.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer
from torch import nn

from dora_fx.megatron.live_objects import live_objects

logger = logging.getLogger(__name__)


class MainCopy(NamedTuple):
    """A parameter, or a part of it, with the tensor that an optimizer steps in its place.

    Attributes:
        parameter: of the model.
        main: what is stepped, of the part's number of elements.
        part: of the flat parameter.
        buffer: what the optimizer writes into, where that is not the parameter.
    """

    parameter: nn.Parameter
    main: torch.Tensor
    part: slice
    buffer: torch.Tensor | None = None

    def own_part(self) -> torch.Tensor:
        """Return the part of the parameter, flattened."""
        return self.parameter.detach().reshape(-1)[self.part]

    def is_reached(self) -> bool:
        """Return whether a step changes the parameter."""
        return self.buffer is None or memory_of(self.buffer) == memory_of(self.parameter)


def main_copies(optimizer: Any) -> list[MainCopy]:
    """Return the copies that one of Megatron's optimizers, not a chain of them, steps on this rank."""
    if getattr(optimizer, "is_stub_optimizer", True) or _keeps_weights_itself(optimizer):
        return []
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = _pairs(optimizer.float16_groups, optimizer.fp32_from_float16_groups)
        return [MainCopy(parameter, main, slice(None)) for parameter, main in pairs]
    if isinstance(optimizer, DistributedOptimizer) and not optimizer.ddp_config.use_megatron_fsdp:
        pairs = _pairs(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups)
        pairs += _pairs(optimizer.model_fp32_groups, optimizer.shard_fp32_groups)
        return [_of_distributed(optimizer, parameter, main) for parameter, main in pairs]
    return []


def copies_stepped_by(inner: torch.optim.Optimizer) -> list[MainCopy]:
    """Return the copies that an optimizer of torch's steps, which is inside one of Megatron's."""
    outer = [found for found in live_objects(MixedPrecisionOptimizer) if getattr(found, "optimizer", None) is inner]
    return [copy for optimizer in outer for copy in main_copies(optimizer)]


# The search walks all objects of the process, so it is done once for each optimizer. Of the parameters, none refers to
# an optimizer.
_changed: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[nn.Parameter] | None] = weakref.WeakKeyDictionary()


def parameters_changed_by(inner: torch.optim.Optimizer) -> list[nn.Parameter] | None:
    """Return the parameters that a step of one of Megatron's optimizers changes, on any data-parallel rank.

    Args:
        inner: the optimizer of torch's inside it.

    Returns:
        None where it is not known: the optimizer is inside none of Megatron's, or one of another class.
    """
    # Megatron alone writes this key into groups.
    if not any("is_expert_parallel" in group for group in inner.param_groups):
        return None
    if inner not in _changed:
        outer = [found for found in live_objects(MixedPrecisionOptimizer) if getattr(found, "optimizer", None) is inner]
        _changed[inner] = _all_parameters_maybe(outer[0]) if len(outer) == 1 else None
    return _changed[inner]


def _all_parameters_maybe(optimizer: Any) -> list[nn.Parameter] | None:
    """Return the parameters that one of Megatron's optimizers writes into, or that its parameter gather brings."""
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        groups = (*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups)
        return [parameter for group in groups for parameter in group]
    if isinstance(optimizer, DistributedOptimizer) and not optimizer.ddp_config.use_megatron_fsdp:
        # A rank steps its own part of the buffers, and gathers those of others.
        return [parameter for buffer in optimizer.buffers for parameter in buffer.params]
    return None


@torch.no_grad()
def update_main_copies(parameters: Iterable[nn.Parameter]) -> None:
    """Write the values of these parameters into all main copies of them; every loader of parameters calls it.

    A copy that rounds to the parameter is left alone, as it has more digits. A warning names an optimizer that keeps
    its float32 weights where they cannot be written.
    """
    written = {parameter for parameter in parameters if hasattr(parameter, "main_param")}
    if not written:
        return
    for optimizer in live_objects(MixedPrecisionOptimizer):
        trained = written.intersection(_trained_in_16_bits(optimizer))
        if trained and _keeps_weights_itself(optimizer):
            logger.warning(
                "%s trains a parameter that was loaded, and keeps its float32 weights in its own state "
                "(use_precision_aware_optimizer, optimizer_cpu_offload); from its second step on it goes on from the "
                "values before; load before the first step, or with the optimizer",
                type(optimizer).__name__,
            )
        write([copy for copy in differing(main_copies(optimizer)) if copy.parameter in trained])


def write(copies: Iterable[MainCopy]) -> None:
    """Write the values of the parameters into their main copies."""
    for copy in copies:
        copy.main.data.view(-1).copy_(copy.own_part())


@torch.no_grad()
def differing(copies: Sequence[MainCopy]) -> list[MainCopy]:
    """Return the copies that do not round to their 16-bit parameters; waits for the device once."""
    copies = [copy for copy in copies if copy.main.dtype != copy.parameter.dtype]
    if not copies:
        return []
    parts = [copy.own_part() for copy in copies]
    rounded = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(rounded, [copy.main.view(-1) for copy in copies])
    equal = _equal(parts, rounded)
    return [
        copy
        for copy, mine, theirs, same in zip(copies, parts, rounded, equal, strict=True)
        if not same and not torch.allclose(mine, theirs, rtol=0, atol=0, equal_nan=True)
    ]


def _equal(parts: list[torch.Tensor], others: list[torch.Tensor]) -> list[bool]:
    """Compare tensors pairwise; NaN in both counts as a difference."""
    if all(part.is_cpu for part in parts):
        return list(map(torch.equal, parts, others))
    return _equal_by_norms(parts, others)


def _equal_by_norms(parts: list[torch.Tensor], others: list[torch.Tensor]) -> list[bool]:
    """Compare tensors pairwise on a device, waiting for it once; infinity in both counts as a difference."""
    differences = torch._foreach_norm(torch._foreach_sub(parts, others), ord=math.inf)
    found: list[bool] = (torch.stack([difference.float() for difference in differences]) == 0).tolist()
    return found


def _pairs(groups: Sequence[Sequence[Any]], mains: Sequence[Sequence[Any]]) -> list[tuple[Any, Any]]:
    return [pair for group, own in zip(groups, mains, strict=True) for pair in zip(group, own, strict=True)]


def _of_distributed(optimizer: Any, parameter: nn.Parameter, main: torch.Tensor) -> MainCopy:
    part = optimizer._get_model_param_range_map(parameter)["param"]
    buffer, _, bucket = optimizer.model_param_gbuf_map[parameter]
    return MainCopy(parameter, main, slice(part.start, part.end), optimizer.buffers[buffer].buckets[bucket].param_data)


def _trained_in_16_bits(optimizer: Any) -> Iterator[nn.Parameter]:
    for name in ("float16_groups", "model_float16_groups"):
        for group in getattr(optimizer, name, ()):
            yield from group


def _keeps_weights_itself(optimizer: Any) -> bool:
    """Return whether float32 weights are in the state of a fused or an offloading optimizer."""
    is_offloading = hasattr(getattr(optimizer, "optimizer", None), "update_fp32_param_by_new_param")
    return is_offloading or optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def memory_of(tensor: torch.Tensor) -> int:
    """Return an identity of a tensor's memory: the same for a parameter and for Megatron's views of it."""
    return tensor.untyped_storage()._cdata
