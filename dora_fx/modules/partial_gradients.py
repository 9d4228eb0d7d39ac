"""Gradients that are partial sums on each rank, added up over micro-batches and completed once per optimizer step.

Of a factor that its layout gathers, every rank has a partial gradient of the whole and needs the total of its own rows.
Of a replicated magnitude behind a sequence-sharded output, every rank needs the total of all rows. Only the sums over a
step's backward passes matter. So the gradient goes to a leaf (`function/gradient_leaves.py`) and from there into a sum
in the dtype of Megatron's `main_grad`. When Megatron starts to reduce a bucket over data-parallel ranks, the sums of
the bucket's parameters are completed, in one message of each kind, and added to `main_grad`:

    backward pass         leaf.grad -> total                     no collective
    last backward pass    register_grad_ready(parameter)         as Megatron's own hook on a gradient does
    start_grad_sync       main_grad += reduce_scatter(total)     and then Megatron's own reduction
    zero_grad_buffer      total is dropped

An optimizer that steps in between would miss a part of the gradient, so its step raises. Where no such wrapper reduces
the parameter's gradient, every backward pass completes it, unless `complete_gradients="once_per_step"` was asked for.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dora_fx.function import all_reduce_coalesced, reduce_scatter_rows
from dora_fx.megatron import GradientBucket, find_bucket_maybe, memory_of
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter
from dora_fx.ranks import group_size

# When the gradients that are partial sums on each rank are completed; see `DoRA.complete_gradients`.
GradientCompletion = Literal["auto", "every_backward", "once_per_step"]

logger = logging.getLogger(__name__)


class PartialGradientsError(RuntimeError):
    """An optimizer steps before the gradients of the step were completed over the tensor-parallel ranks."""


class GradientAccumulator:
    """The sum of one parameter's partial gradients over the micro-batches of a step.

    Args:
        adapter: the parameter's module.
        name: of the parameter there. It is looked up anew, as a load may have replaced it.
        path: of the adapted layer, for messages.
        is_required: raise where no wrapper would complete the sum, in place of completing it in the backward pass.

    Attributes:
        leaf: receives the gradient in the backward pass, and has the whole tensor's shape. Its values are never read.
        total: the sum since gradients were last completed, of the whole tensor's shape in the dtype of `main_grad`;
            None where there is nothing to complete.
    """

    def __init__(self, adapter: ParallelLinearDoRAAdapter, name: str, path: str, *, is_required: bool) -> None:
        self.adapter, self.name, self.path, self.is_required = adapter, name, path, is_required
        parameter = self.parameter
        # Of a factor, the dimension of rows: a grouped layer's factors have that of experts in front of it.
        self.rows_dim = adapter.placements[name].shard_dim
        shape = list(parameter.shape if self.rows_dim is None else self._rows_first(parameter).shape)
        if self.is_sharded:
            shape[0] *= group_size(adapter.tp_group)
        # Autograd checks the shape of a leaf's gradient, and nothing reads the leaf itself. With strides of zero it has
        # the memory of one element, where a whole factor would have tp times the memory of the shard.
        strides = [0] * len(shape)
        self.leaf = torch.empty_strided(shape, strides, dtype=parameter.dtype, device=parameter.device)
        # The leaf owns the hook, and this object owns the leaf. With a strong reference back they would form a cycle
        # that is never collected, with the adapter in it.
        collect = weakref.WeakMethod(self._collect)
        self.leaf.requires_grad_().register_post_accumulate_grad_hook(lambda _: _call_maybe(collect))
        self.total: torch.Tensor | None = None
        # The search for a bucket walks wrappers of the whole process, so it is done once for each `main_grad`.
        self._main_grad: torch.Tensor | None = None
        self._bucket: GradientBucket | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy needs a leaf whose hook calls the copy. Sums are not copied: a copied parameter is in no bucket that
        # would complete them.
        make = functools.partial(GradientAccumulator, is_required=self.is_required)
        return make, (self.adapter, self.name, self.path)

    @property
    def is_sharded(self) -> bool:
        """Return whether each rank stores some of the rows alone."""
        return self.rows_dim is not None

    def _rows_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange the dimension of rows and the first one, as collectives scatter the latter; twice is none."""
        return tensor if self.rows_dim is None else tensor.transpose(0, self.rows_dim)

    def add_completed(self, gradient: torch.Tensor) -> None:
        """Add what a collective made of sums to Megatron's gradient of the parameter."""
        self.parameter.main_grad.add_(self._rows_first(gradient))  # type: ignore[attr-defined]

    @property
    def parameter(self) -> nn.Parameter:
        """Return the parameter whose gradient is added up."""
        return self.adapter.get_parameter(self.name)

    def fits(self) -> bool:
        """Return whether the leaf has the parameter's dtype and device."""
        parameter = self.parameter
        return self.leaf.dtype == parameter.dtype and self.leaf.device == parameter.device

    def takes_gradient_of(self, parameter: nn.Parameter) -> bool:
        """Return whether the parameter's gradient goes to the leaf.

        Dynamo traces this function and guards on the attribute that it reads, so it must be cheap and cannot search for
        the wrapper. A `main_grad` that is left from a wrapper that is gone, or that another library made, passes here;
        `_collect` finds no bucket for it then, and completes the gradient at once.
        """
        return self.is_required or hasattr(parameter, "main_grad")

    @torch.no_grad()
    def _collect(self) -> None:
        """Move what a backward pass left in the leaf to the sum."""
        grad, self.leaf.grad = self.leaf.grad, None
        if grad is None:
            # Autograd calls the hook for every input of a compiled graph, those that no gradient reached included.
            return
        bucket = self._current_bucket_maybe()
        if bucket is None:
            self._complete_now(grad.detach())
            return
        if self.total is None:
            assert self._main_grad is not None
            # Megatron adds micro-batches up in this dtype, float32 with `grad_reduce_in_fp32`. A sum in bfloat16 would
            # round each addition, and the result would depend on when gradients are completed.
            self.total = grad.detach().to(self._main_grad.dtype)
            _pending.add(self)
            _guard_optimizers()
        else:
            self.total.add_(grad)
        # Megatron's own hook is on the parameter, which autograd passes by, and an overlapped reduction starts once it
        # was told of every parameter of its bucket.
        bucket.register_ready(self.parameter)

    def take(self) -> torch.Tensor:
        """Return the sum, and be without one."""
        total, self.total = self.total, None
        _pending.discard(self)
        assert total is not None
        return total

    def optimized_with(self) -> list[torch.Tensor]:
        """Return the parameters that the same wrapper reduces, and Megatron's float32 copies of them."""
        parameters = [] if self._bucket is None else self._bucket.parameters()
        copies = [getattr(parameter, "main_param", None) for parameter in parameters]
        return [*parameters, *(copy for copy in copies if copy is not None)]

    def _complete_now(self, gradient: torch.Tensor) -> None:
        """Complete the gradient of one backward pass over the ranks, and add it to the parameter's."""
        if self.is_required:
            raise ValueError(
                f"{self.path}.adapter.{self.name}: complete_gradients='once_per_step' completes gradients where "
                "Megatron's DistributedDataParallel starts to reduce them, and found none that has this parameter; "
                "expected one around the model, or complete_gradients='auto'"
            )
        (completed,) = _collective_for(is_sharded=self.is_sharded)([gradient], self.adapter.tp_group)
        # Through autograd and not into `.grad`, so that hooks on the parameter run: torch's DistributedDataParallel and
        # users have theirs there.
        self.parameter.backward(self._rows_first(completed))

    def _current_bucket_maybe(self) -> GradientBucket | None:
        """Return the bucket of the parameter's gradient now; a new wrapper around the model makes new buckets."""
        main_grad: torch.Tensor | None = getattr(self.parameter, "main_grad", None)
        if main_grad is not self._main_grad or (self._bucket is not None and self._bucket.is_gone()):
            if self.total is not None:
                # The sum was to be added to the old wrapper's gradient, which no optimizer reads any more.
                self.take()
            self._main_grad = main_grad
            self._bucket = find_bucket_maybe(self.parameter, before_reduction=complete, after_reset=give_up)
        return self._bucket


def _collective_for(*, is_sharded: bool) -> Callable[[Sequence[torch.Tensor], str], Sequence[torch.Tensor]]:
    """Return the collective that completes partial sums of parameters that are sharded by rows, or replicated."""
    # A rank needs no more than its own rows of a sharded parameter's gradient, and all of a replicated one's.
    return reduce_scatter_rows if is_sharded else all_reduce_coalesced


# The accumulators that have a sum. Weak, since a model that is deleted within a step has nothing left to complete.
_pending: weakref.WeakSet[GradientAccumulator] = weakref.WeakSet()


def _call_maybe(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    alive = method()
    if alive is not None:
        alive()


class SiteAccumulators(NamedTuple):
    """The accumulators of one site; None for a tensor whose gradient each backward pass completes."""

    lora_a: GradientAccumulator | None = None
    lora_b: GradientAccumulator | None = None
    magnitude: GradientAccumulator | None = None

    def fit_parameters(self) -> bool:
        """Return whether the leaves have the dtypes and devices of their parameters."""
        return all(accumulator is None or accumulator.fits() for accumulator in self)


def make_accumulators(
    adapter: ParallelLinearDoRAAdapter, path: str, complete_gradients: GradientCompletion
) -> SiteAccumulators:
    """Make accumulators for the gradients of an adapter that are partial on each rank, if they are completed later."""
    layout = adapter.layout
    # A leaf has no values, so it can take the place only of a gathered factor, which is read from the cache, and of a
    # magnitude, which is not read. A layer that is whole on every rank reads its own factors.
    if complete_gradients == "every_backward" or group_size(adapter.tp_group) == 1 or layout.shards_tokens:
        return SiteAccumulators()
    is_partial = {
        "linear_in.weight": layout.gathers_lora_a,
        "linear_out.weight": layout.gathers_lora_b,
        "weight_magnitude": layout.magnitude_grad_is_partial(dropout=True),
    }
    make = functools.partial(GradientAccumulator, adapter, path=path, is_required=complete_gradients == "once_per_step")
    # Dropout may be switched on later, so the magnitude is prepared for it; `num_partial_sums` counts what is in use.
    return SiteAccumulators(*(make(name) if partial else None for name, partial in is_partial.items()))


def leaves_for(accumulators: SiteAccumulators, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the leaves that take the gradients of A, B and m in a call now; None for a gradient that has none.

    An evaluation has none at all, so its graph is the same before and after a wrapper is put around the model.
    """
    if not any(accumulators) or not torch.is_grad_enabled():
        return [None, None, None]
    pairs = zip(accumulators, parameters, strict=True)
    return [_leaf_maybe(accumulator, parameter) for accumulator, parameter in pairs]


def _leaf_maybe(accumulator: GradientAccumulator | None, parameter: torch.Tensor) -> torch.Tensor | None:
    # `torch.func.functional_call` puts plain tensors in the place of parameters, and asks for the gradients of these.
    if accumulator is None or not parameter.requires_grad or not isinstance(parameter, nn.Parameter):
        return None
    return accumulator.leaf if accumulator.takes_gradient_of(parameter) else None


@torch.no_grad()
def complete(parameters: Sequence[nn.Parameter]) -> None:
    """Complete the pending sums of those parameters and add them to `main_grad`.

    Args:
        parameters: in the same order on all ranks of a tensor-parallel group, which call it alike.
    """
    # One message for all sums that one collective can take: latency is what a message of such small tensors costs.
    messages: dict[tuple[str, torch.dtype, bool], list[GradientAccumulator]] = {}
    for accumulator in _pending_of(parameters):
        assert accumulator.total is not None
        key = (accumulator.adapter.tp_group, accumulator.total.dtype, accumulator.is_sharded)
        messages.setdefault(key, []).append(accumulator)
    for (tp_group, _, is_sharded), accumulators in messages.items():
        completed = _collective_for(is_sharded=is_sharded)([each.take() for each in accumulators], tp_group)
        for accumulator, gradient in zip(accumulators, completed, strict=True):
            accumulator.add_completed(gradient)


def give_up(parameters: Sequence[nn.Parameter]) -> None:
    """Drop the pending sums of those parameters, whose gradients were set to zero for a new step."""
    given_up = _pending_of(parameters)
    for accumulator in given_up:
        accumulator.take()
    if given_up:
        names = ", ".join(f"{each.path}.adapter.{each.name}" for each in given_up)
        logger.warning("gave up gradients that no reduction had completed: %s", names)


def _pending_of(parameters: Sequence[nn.Parameter]) -> list[GradientAccumulator]:
    """Return the accumulators with a sum for one of the parameters, in the order of the parameters.

    A weak set iterates in another order on each rank, and a message is the tensors in their order.
    """
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    found = [accumulator for accumulator in _pending if accumulator.parameter in numbers]
    return sorted(found, key=lambda accumulator: numbers[accumulator.parameter])


def _refuse_partial_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # Megatron steps views of parameters or float32 copies, so a stepped tensor is recognised by its memory.
    stepped = {memory_of(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for accumulator in _pending:
        # All parameters of the wrapper are compared, and not this one alone: a distributed optimizer has a part of the
        # parameters on each rank, and a rank that does not raise would wait in a collective for those that do.
        if stepped.isdisjoint(map(memory_of, accumulator.optimized_with())):
            continue
        raise PartialGradientsError(
            f"{accumulator.path}.adapter.{accumulator.name}: found an optimizer's step while the gradient is a partial "
            "sum on each tensor-parallel rank; expected finalize_model_grads, or finish_grad_sync of Megatron's "
            "DistributedDataParallel, before it"
        )


@functools.cache
def _guard_optimizers() -> None:
    """Refuse steps that would miss a part of a gradient, from the first sum of a process on.

    The hook runs at every step of every optimizer, so processes that never add gradients up do without it.
    """
    register_optimizer_step_pre_hook(_refuse_partial_gradients)
