"""Where a step's loss or gradients are not finite first, for the message of a step that makes no update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.attach import adapted_layers
from dora_fx.ranks import gather_objects, world_group


def problem_of_step_maybe(model: nn.Module, loss: float, grad_norm: float, run: Callable[[], object]) -> str | None:
    """What forbids the update of a step, the same on every rank; None where all is finite. Every rank calls it.

    Args:
        model: with the gradients of the step, complete.
        loss, grad_norm: of the step.
        run: passes the step's batches through the model again, forward alone; called where a loss is not finite.
    """
    losses, norms = zip(*gather_objects((loss, grad_norm), world_group()), strict=True)
    if not all(map(_is_finite, losses)):
        path = _first_of_ranks(_first_output_maybe(model, run))
        where = f"the output of {path} is the first" if path else "the outputs of all adapted layers are finite"
        return f"the loss is {_first_not_finite(losses):g}: {where}"
    if not all(map(_is_finite, norms)):
        path = _first_of_ranks(_first_gradient_maybe(model), backward=True)
        if path is None:
            return f"the norm of the gradients is {_first_not_finite(norms):g}, though each of them is finite"
        return f"the gradient of {path} is the first of the backward pass that is not finite"
    return None


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _first_not_finite(values: tuple[float, ...]) -> float:
    return next(value for value in values if not _is_finite(value))


# A layer's number and the stage before it, to tell which comes first in the whole model, and the path to name.
_Place = tuple[int, int, str]


def _first_of_ranks(own: _Place | None, *, backward: bool = False) -> str | None:
    """The path that comes first over all ranks, in the order of the forward or the backward pass."""
    found = [place for place in gather_objects(own, world_group()) if place is not None]
    if not found:
        return None
    return (max if backward else min)(found, key=lambda place: place[:2])[2]


def _numbered_layers(model: nn.Module) -> Iterator[tuple[int, int, Any]]:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for index, (_, named) in enumerate(adapted_layers([model])):
        yield stage, index, named


def _first_gradient_maybe(model: nn.Module) -> _Place | None:
    """The last layer, which is the first that the backward pass comes to, with a gradient that is not finite."""
    for stage, index, named in reversed(list(_numbered_layers(model))):
        for name, parameter in named.module.adapter.named_parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None and not torch.isfinite(gradient).all():
                return stage, index, f"{named.whole_path}.adapter.{name}"
    return None


@torch.no_grad()
def _first_output_maybe(model: nn.Module, run: Callable[[], object]) -> _Place | None:
    """The first layer whose output is not finite when the batches are run again; nothing is compiled for it."""
    found: list[_Place] = []
    with ExitStack() as hooks:
        for stage, index, named in _numbered_layers(model):

            def look(_: object, __: object, output: Any, place: _Place = (stage, index, named.whole_path)) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    found.append(place)

            hooks.callback(named.module.register_forward_hook(look).remove)
        with torch.compiler.set_stance("force_eager"):
            run()
    return min(found, default=None, key=lambda place: place[:2])
