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

An optimizer that steps in between would miss a part of the gradient, so it raises.
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

from dora_fx.function.collectives import all_reduce_coalesced, reduce_scatter_rows
from dora_fx.megatron.gradient_buckets import GradientBucket, find_bucket_maybe
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter
from dora_fx.ranks.groups import group_size

CompleteGradients = Literal["every_backward", "once_per_step"]

logger = logging.getLogger(__name__)


class PartialGradientsError(RuntimeError):
    """An optimizer steps before the gradients of the step were completed over the tensor-parallel ranks."""


class PartialGradient:
    """Adds up one parameter's partial gradients until they are completed.

    Args:
        adapter: the parameter's module.
        name: of the parameter there. It is looked up anew, as a load may have replaced it.
        path: of the adapted layer, for messages.

    Attributes:
        leaf: takes the gradient, of the whole tensor's shape. It has no memory of that size, and no values.
        total: the sum since gradients were last completed, of the whole tensor's shape in the dtype of `main_grad`;
            None where there is nothing to complete.
    """

    def __init__(self, adapter: ParallelLinearDoRAAdapter, name: str, path: str) -> None:
        self.adapter, self.name, self.path = adapter, name, path
        _guard_optimizers()
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
        self._bucket: GradientBucket | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles get a leaf and a hook of their own.
        return PartialGradient, (self.adapter, self.name, self.path)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter whose gradient it is."""
        return self.adapter.get_parameter(self.name)

    def fits(self) -> bool:
        """Return whether the leaf has the parameter's dtype and device."""
        parameter = self.parameter
        return self.leaf.dtype == parameter.dtype and self.leaf.device == parameter.device

    @torch.no_grad()
    def _collect(self) -> None:
        """Move what a backward pass left in the leaf to the sum."""
        grad, self.leaf.grad = self.leaf.grad, None
        if grad is None:
            # Autograd calls the hook of a compiled graph's input that no gradient reached, too.
            return
        bucket = self._current_bucket()
        if self.total is None:
            self.total = grad.detach().to(bucket.main_grad.dtype)
            _pending.add(self)
        else:
            self.total.add_(grad)
        bucket.register_ready(self.parameter)

    def take(self) -> torch.Tensor:
        """Return the sum and start anew."""
        total, self.total = self.total, None
        _pending.discard(self)
        assert total is not None
        return total

    def _current_bucket(self) -> GradientBucket:
        """The bucket of the parameter's gradient, which a new wrapper around the model replaces."""
        parameter = self.parameter
        if self._bucket is None or self._bucket.main_grad is not getattr(parameter, "main_grad", None):
            if self.total is not None:
                # The gradient that it was to be added to is gone.
                self.take()
            self._bucket = find_bucket_maybe(parameter, before_reduction=complete, after_reset=give_up)
        if self._bucket is None:
            raise ValueError(
                f"{self.path}.adapter.{self.name}: complete_gradients='once_per_step' completes gradients where "
                "Megatron's DistributedDataParallel starts to reduce them, and found none that has this parameter; "
                "expected one around the model, or complete_gradients='every_backward'"
            )
        return self._bucket


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
    return PartialGradients(
        *(PartialGradient(adapter, name, path) if partial else None for name, partial in is_partial.items())
    )


def leaves_for(partials: PartialGradients, adapter: ParallelLinearDoRAAdapter) -> list[torch.Tensor | None]:
    """The leaves of A, B and m; None for one that is not trained, and where `functional_call` puts another tensor."""
    if not any(partials):
        return [None, None, None]
    parameters = (adapter.linear_in.weight, adapter.linear_out.weight, adapter.weight_magnitude)
    is_trained = [parameter.requires_grad and isinstance(parameter, nn.Parameter) for parameter in parameters]
    return [
        partial.leaf if trained and partial is not None else None
        for partial, trained in zip(partials, is_trained, strict=True)
    ]


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
        collective = reduce_scatter_rows if is_sharded else all_reduce_coalesced
        completed = collective([partial.take() for partial in partials], tp_group)
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


def _refuse_partial_gradients(*_: object) -> None:
    for partial in _pending:
        raise PartialGradientsError(
            f"{partial.path}.adapter.{partial.name}: found an optimizer's step while the gradient is a partial sum on "
            "each tensor-parallel rank; expected finalize_model_grads, or finish_grad_sync of Megatron's "
            "DistributedDataParallel, before it"
        )


@functools.cache
def _guard_optimizers() -> None:
    """From the first sums of a process on, refuse steps that would miss a part of a gradient."""
    register_optimizer_step_pre_hook(_refuse_partial_gradients)
