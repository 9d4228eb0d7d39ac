"""Gradients that are partial sums on each rank, added up over micro-batches and completed once per optimizer step.

Of a factor that its layout gathers, every rank has a partial gradient of the whole and needs the total of its own rows.
Of a replicated magnitude behind a sequence-sharded output, every rank needs the total of all rows. Only the sums over a
step's backward passes matter. So the gradient goes to a leaf (`function/gradient_leaves.py`) and from there into a sum
in the dtype of Megatron's `main_grad`. When Megatron starts to reduce a bucket over data-parallel ranks, the sums of
the bucket's parameters are completed, in one message of each kind, and added to `main_grad`:

    backward pass         leaf.grad -> total                     no collective
    last backward pass    register_grad_ready(parameter)         as Megatron's own hook on a gradient does
    start_grad_sync       main_grad += reduce_scatter(total)     and then Megatron's own reduction
    zero_grad_buffer      total is given up

An optimizer that steps in between would miss a part of the gradient, so it raises. Where no such wrapper reduces the
parameter's gradient, every backward pass completes it, unless the sums were asked for by name.
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

CompleteGradients = Literal["auto", "every_backward", "once_per_step"]

logger = logging.getLogger(__name__)


class PartialGradientsError(RuntimeError):
    """An optimizer steps before the gradients of the step were completed over the tensor-parallel ranks."""


class PartialGradient:
    """Adds up one parameter's partial gradients until they are completed.

    Args:
        adapter: the parameter's module.
        name: of the parameter there. It is looked up anew, as a load may have replaced it.
        path: of the adapted layer, for messages.
        is_required: never leave the gradient to the backward pass, but raise where nothing would complete it.

    Attributes:
        leaf: takes the gradient, of the whole tensor's shape. It has no memory of that size, and no values.
        total: the sum since gradients were last completed, of the whole tensor's shape in the dtype of `main_grad`;
            None where there is nothing to complete.
    """

    def __init__(self, adapter: ParallelLinearDoRAAdapter, name: str, path: str, *, is_required: bool) -> None:
        self.adapter, self.name, self.path, self.is_required = adapter, name, path, is_required
        parameter = self.parameter
        self.is_sharded = adapter.placements[name].shard_dim is not None
        rows, *others = parameter.shape
        shape = (rows * group_size(adapter.tp_group) if self.is_sharded else rows, *others)
        strides = (0,) * len(shape)
        self.leaf = torch.empty_strided(shape, strides, dtype=parameter.dtype, device=parameter.device)
        # A hook that holds its own tensor's owner would never be collected.
        collect = weakref.WeakMethod(self._collect)
        self.leaf.requires_grad_().register_post_accumulate_grad_hook(lambda _: _call_maybe(collect))
        self.total: torch.Tensor | None = None
        # The bucket is looked for once for each `main_grad`.
        self._main_grad: torch.Tensor | None = None
        self._bucket: GradientBucket | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles get a leaf and a hook of their own.
        make = functools.partial(PartialGradient, is_required=self.is_required)
        return make, (self.adapter, self.name, self.path)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter whose gradient it is."""
        return self.adapter.get_parameter(self.name)

    def fits(self) -> bool:
        """Return whether the leaf has the parameter's dtype and device."""
        parameter = self.parameter
        return self.leaf.dtype == parameter.dtype and self.leaf.device == parameter.device

    def takes_gradient_of(self, parameter: nn.Parameter) -> bool:
        """Return whether the parameter's gradient goes to the leaf. Dynamo traces it, and guards on what it asks.

        A `main_grad` may be of a wrapper that is gone, or of another maker. `_collect` sees to these.
        """
        return self.is_required or hasattr(parameter, "main_grad")

    @torch.no_grad()
    def _collect(self) -> None:
        """Move what a backward pass left in the leaf to the sum."""
        grad, self.leaf.grad = self.leaf.grad, None
        if grad is None:
            # Autograd calls the hook of a compiled graph's input that no gradient reached, too.
            return
        bucket = self._current_bucket_maybe()
        if bucket is None:
            self._complete_now(grad.detach())
            return
        if self.total is None:
            assert self._main_grad is not None
            self.total = grad.detach().to(self._main_grad.dtype)
            _pending.add(self)
            _guard_optimizers()
        else:
            self.total.add_(grad)
        bucket.register_ready(self.parameter)

    def take(self) -> torch.Tensor:
        """Return the sum and start anew."""
        total, self.total = self.total, None
        _pending.discard(self)
        assert total is not None
        return total

    def optimized_with(self) -> list[torch.Tensor]:
        """The parameters that the same wrapper reduces, and Megatron's float32 copies of them."""
        parameters = [] if self._bucket is None else self._bucket.parameters()
        copies = [getattr(parameter, "main_param", None) for parameter in parameters]
        return [*parameters, *(copy for copy in copies if copy is not None)]

    def _complete_now(self, gradient: torch.Tensor) -> None:
        """Give the parameter the gradient of one backward pass."""
        if self.is_required:
            raise ValueError(
                f"{self.path}.adapter.{self.name}: complete_gradients='once_per_step' completes gradients where "
                "Megatron's DistributedDataParallel starts to reduce them, and found none that has this parameter; "
                "expected one around the model, or complete_gradients='auto'"
            )
        (completed,) = _collective_for(is_sharded=self.is_sharded)([gradient], self.adapter.tp_group)
        # Through autograd, for hooks on the parameter.
        self.parameter.backward(completed)

    def _current_bucket_maybe(self) -> GradientBucket | None:
        """The bucket of the parameter's gradient, which a new wrapper around the model replaces."""
        main_grad: torch.Tensor | None = getattr(self.parameter, "main_grad", None)
        if main_grad is not self._main_grad or (self._bucket is not None and self._bucket.is_gone()):
            if self.total is not None:
                # The gradient that it was to be added to is gone.
                self.take()
            self._main_grad = main_grad
            self._bucket = find_bucket_maybe(self.parameter, before_reduction=complete, after_reset=give_up)
        return self._bucket


def _collective_for(*, is_sharded: bool) -> Callable[[Sequence[torch.Tensor], str], Sequence[torch.Tensor]]:
    """What completes partial sums of parameters that are sharded by rows, or replicated."""
    return reduce_scatter_rows if is_sharded else all_reduce_coalesced


# Those that have a sum. A model that is gone has nothing to complete.
_pending: weakref.WeakSet[PartialGradient] = weakref.WeakSet()


def _call_maybe(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    alive = method()
    if alive is not None:
        alive()


class PartialGradients(NamedTuple):
    """Those of one site; None for a tensor whose gradient each backward pass completes."""

    lora_a: PartialGradient | None = None
    lora_b: PartialGradient | None = None
    magnitude: PartialGradient | None = None

    def fit_parameters(self) -> bool:
        """Return whether the leaves have the dtypes and devices of their parameters."""
        return all(partial is None or partial.fits() for partial in self)


def partial_gradients(
    adapter: ParallelLinearDoRAAdapter, path: str, complete_gradients: CompleteGradients
) -> PartialGradients:
    """Make what adds up those gradients of an adapter that are partial on each rank, if they are completed later."""
    layout = adapter.layout
    # A layer that is whole on every rank reads its own factors, and what takes their place has no values.
    if complete_gradients == "every_backward" or group_size(adapter.tp_group) == 1 or layout.shards_tokens:
        return PartialGradients()
    is_partial = {
        "linear_in.weight": layout.gathers_lora_a,
        "linear_out.weight": layout.gathers_lora_b,
        "weight_magnitude": layout.magnitude_grad_is_partial(dropout=True),
    }
    make = functools.partial(PartialGradient, adapter, path=path, is_required=complete_gradients == "once_per_step")
    return PartialGradients(*(make(name) if partial else None for name, partial in is_partial.items()))


def leaves_for(partials: PartialGradients, adapter: ParallelLinearDoRAAdapter) -> list[torch.Tensor | None]:
    """The leaves of A, B and m; None for one that is not trained, and where `functional_call` puts another tensor.

    None, too, where the backward pass completes the gradient, and where there is no such pass: an evaluation's graph is
    the same before and after the model is wrapped.
    """
    if not any(partials) or not torch.is_grad_enabled():
        return [None, None, None]
    parameters = (adapter.linear_in.weight, adapter.linear_out.weight, adapter.weight_magnitude)
    return [_leaf_maybe(partial, parameter) for partial, parameter in zip(partials, parameters, strict=True)]


def _leaf_maybe(partial: PartialGradient | None, parameter: torch.Tensor) -> torch.Tensor | None:
    if partial is None or not parameter.requires_grad or not isinstance(parameter, nn.Parameter):
        return None
    return partial.leaf if partial.takes_gradient_of(parameter) else None


@torch.no_grad()
def complete(parameters: Sequence[nn.Parameter]) -> None:
    """Complete the pending sums of those parameters and add them to `main_grad`.

    Args:
        parameters: in the same order on all ranks of a tensor-parallel group, which call it alike.
    """
    messages: dict[tuple[str, torch.dtype, bool], list[PartialGradient]] = {}
    for partial in _pending_of(parameters):
        assert partial.total is not None
        key = (partial.adapter.tp_group, partial.total.dtype, partial.is_sharded)
        messages.setdefault(key, []).append(partial)
    for (tp_group, _, is_sharded), partials in messages.items():
        completed = _collective_for(is_sharded=is_sharded)([partial.take() for partial in partials], tp_group)
        for partial, gradient in zip(partials, completed, strict=True):
            partial.parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]


def give_up(parameters: Sequence[nn.Parameter]) -> None:
    """Forget the sums of those parameters that are not completed, as their gradients start anew."""
    given_up = _pending_of(parameters)
    for partial in given_up:
        partial.take()
    if given_up:
        names = ", ".join(f"{partial.path}.adapter.{partial.name}" for partial in given_up)
        logger.warning("gave up gradients that no reduction had completed: %s", names)


def _pending_of(parameters: Sequence[nn.Parameter]) -> list[PartialGradient]:
    """Those that have a sum for one of the parameters, in the order of the parameters."""
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    found = [partial for partial in _pending if partial.parameter in numbers]
    return sorted(found, key=lambda partial: numbers[partial.parameter])


def _refuse_partial_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    stepped = {memory_of(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for partial in _pending:
        # A distributed optimizer has a part of each model's parameters on each rank, and all ranks raise.
        if stepped.isdisjoint(map(memory_of, partial.optimized_with())):
            continue
        raise PartialGradientsError(
            f"{partial.path}.adapter.{partial.name}: found an optimizer's step while the gradient is a partial sum on "
            "each tensor-parallel rank; expected finalize_model_grads, or finish_grad_sync of Megatron's "
            "DistributedDataParallel, before it"
        )


@functools.cache
def _guard_optimizers() -> None:
    """From the first sums of a process on, refuse steps that would miss a part of a gradient."""
    register_optimizer_step_pre_hook(_refuse_partial_gradients)
