"""Finds the layer where a step's loss or gradients first are not finite, for the message of a skipped step."""

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
    """Return why a step must not update, the same on every rank; None if all is finite. Every rank calls it.

    Args:
        model: with the complete gradients of the step.
        loss, grad_norm: of the step.
        run: runs the forward passes of the step again; called only if a loss is not finite.
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


# Pipeline stage and index of a layer, by which layers are ordered in the whole model, and its path for the message.
_Place = tuple[int, int, str]


def _first_of_ranks(own: _Place | None, *, backward: bool = False) -> str | None:
    """Return the first path over all ranks, in the order of the forward or the backward pass."""
    places = [place for place in gather_objects(own, world_group()) if place is not None]
    if not places:
        return None
    return (max if backward else min)(places, key=lambda place: place[:2])[2]


def _numbered_layers(model: nn.Module) -> Iterator[tuple[int, int, Any]]:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for index, (_, named) in enumerate(adapted_layers([model])):
        yield stage, index, named


def _first_gradient_maybe(model: nn.Module) -> _Place | None:
    """Return the last layer with a gradient that is not finite; the backward pass reaches it first."""
    for stage, index, named in reversed(list(_numbered_layers(model))):
        for name, parameter in named.module.adapter.named_parameters():
            gradient = getattr(parameter, "main_grad", parameter.grad)
            if gradient is not None and not torch.isfinite(gradient).all():
                return stage, index, f"{named.whole_path}.adapter.{name}"
    return None


@torch.no_grad()
def _first_output_maybe(model: nn.Module, run: Callable[[], object]) -> _Place | None:
    """Run the batches again without compiling; return the first layer whose output is not finite."""
    places: list[_Place] = []
    with ExitStack() as hooks:
        for stage, index, named in _numbered_layers(model):

            def check_output(
                _: object, __: object, output: Any, place: _Place = (stage, index, named.whole_path)
            ) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    places.append(place)

            hooks.callback(named.module.register_forward_hook(check_output).remove)
        with torch.compiler.set_stance("force_eager"):
            run()
    return min(places, default=None, key=lambda place: place[:2])
