"""Whatever records a call, or only pretends it, computes the norms with it: no cached one becomes a constant."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dora_fx
from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.models import DIM, IN, LinearZoo, adapt_zoo, sites, trainable

pytestmark = pytest.mark.usefixtures("world")

KINDS = ["column_bias_added", "row", "linear_bias", "output_layer"]
Tensors = dict[str, torch.Tensor]
Step = Callable[[Tensors, Tensors], tuple[Tensors, torch.Tensor]]


def inputs_of(zoo: LinearZoo) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {kind: torch.randn(5, 2, IN, generator=generator) for kind in zoo.kinds}


def called_zoo(dropout: float = 0.0) -> LinearZoo:
    """A zoo whose adapters are away from the identity, and whose buffers are up to date."""
    zoo = adapt_zoo(LinearZoo(KINDS), dropout=dropout)
    # The second call keeps what later ones compare, which a tracer must not read.
    for _ in range(2):
        zoo(inputs_of(zoo))
    return zoo


def loss_of(outputs: Tensors) -> torch.Tensor:
    return torch.stack([(output - 1.0).square().mean() for output in outputs.values()]).sum()


def train_step(zoo: LinearZoo, parameters: Tensors, inputs: Tensors) -> tuple[Tensors, torch.Tensor]:
    """Forward, backward and update, from all parameters to the next ones."""
    loss = loss_of(torch.func.functional_call(zoo, parameters, (inputs,)))
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    updated = {name: value - 0.3 * grad for (name, value), grad in zip(trained.items(), gradients, strict=True)}
    return {name: value.detach() for name, value in (parameters | updated).items()}, loss.detach()


def parameters_of(zoo: LinearZoo) -> Tensors:
    tensors = [*zoo.named_parameters(), *zoo.named_buffers()]
    return {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in tensors}


def three_steps(step: Step, zoo: LinearZoo) -> list[torch.Tensor]:
    """Losses of three steps, and at last the parameters."""
    parameters, trained, losses = parameters_of(zoo), trainable(zoo), []
    for _ in range(3):
        parameters = {name: value.detach().requires_grad_(name in trained) for name, value in parameters.items()}
        parameters, loss = step(parameters, inputs_of(zoo))
        losses.append(loss)
    return [*losses, *(parameters[name] for name in trained)]


def assert_steps_are_the_same(found: list[torch.Tensor], expected: list[torch.Tensor], zoo: LinearZoo) -> None:
    assert_apart(expected[1], expected[0])
    bound = rounding(torch.float32, 6 * roundings_of(zoo))
    names = [f"value {number}" for number in range(len(expected))]
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), bound)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_whole_step_of_make_fx(mode: str) -> None:
    zoo = called_zoo()

    def step(parameters: Tensors, inputs: Tensors) -> tuple[Tensors, torch.Tensor]:
        return train_step(zoo, parameters, inputs)

    recorded = make_fx(step, tracing_mode=mode)(parameters_of(zoo), inputs_of(zoo))
    assert_steps_are_the_same(three_steps(recorded, zoo), three_steps(step, zoo), zoo)


def three_losses_in_place(records: bool) -> tuple[list[torch.Tensor], LinearZoo]:
    """Losses of three steps that write into the parameters of the model."""
    torch.manual_seed(0)
    zoo = called_zoo()
    parameters, inputs, losses = list(trainable(zoo).values()), inputs_of(zoo), []

    def step(inputs: Tensors) -> list[torch.Tensor]:
        loss = loss_of(zoo(inputs))
        return [loss, *torch.autograd.grad(loss, parameters)]

    call = make_fx(step)(inputs) if records else step
    for _ in range(3):
        loss, *gradients = call(inputs)
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.3 * gradient)
    return losses, zoo


def test_a_step_that_closes_over_the_model() -> None:
    """The parameters are constants of the graph that are written in place; what follows from them is none."""
    expected, _ = three_losses_in_place(records=False)
    found, zoo = three_losses_in_place(records=True)
    assert_steps_are_the_same(found, expected, zoo)


def test_aot_function() -> None:
    zoo = called_zoo()
    recorded = aot_function(lambda p, x: list(torch.func.functional_call(zoo, p, (x,)).values()), nop)

    def step(parameters: Tensors, inputs: Tensors) -> tuple[Tensors, torch.Tensor]:
        loss = loss_of(dict(zip(zoo.kinds, recorded(parameters, inputs), strict=True)))
        trained = {name: value for name, value in parameters.items() if value.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
        updated = {name: value - 0.3 * grad for (name, value), grad in zip(trained.items(), gradients, strict=True)}
        return parameters | updated, loss

    expected = three_steps(lambda parameters, inputs: train_step(zoo, parameters, inputs), zoo)
    assert_steps_are_the_same(three_steps(step, zoo), expected, zoo)


class OneLayer(nn.Module):
    def __init__(self, zoo: LinearZoo) -> None:
        super().__init__()
        self.zoo = zoo

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.zoo({"row": x})["row"]


RECORDERS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "non-strict export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
}


@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_recorded_model_follows_its_parameters(recorder: str) -> None:
    model = OneLayer(called_zoo()).eval()
    x = inputs_of(model.zoo)["row"]
    recorded, before = RECORDERS[recorder](model, x), model(x)
    for module in (model, recorded):
        lora_b = operator.attrgetter("zoo.row.adapter.linear_out")(module).weight
        with torch.no_grad():
            lora_b.copy_(torch.linspace(-1.0, 1.0, lora_b.numel()).view_as(lora_b))
    assert_apart(model(x), before)
    assert_close(recorded(x), model(x), rounding(torch.float32, 2 * roundings_of(model)))


def test_recorded_dropout_draws_anew() -> None:
    model = OneLayer(called_zoo(dropout=0.25))
    x = inputs_of(model.zoo)["row"]
    recorded = make_fx(lambda x: model(x))(x)
    torch.manual_seed(5)
    expected = [model(x), model(x)]
    torch.manual_seed(5)
    bound = rounding(torch.float32, 2 * roundings_of(model))
    assert_apart(expected[0], expected[1])
    for output in expected:
        assert_close(recorded(x), output, bound)


@pytest.mark.parametrize("whole_model", [False, True])
def test_fake_tensors(whole_model: bool) -> None:
    """Forward and backward, of real parameters within the mode, or of fake ones anywhere."""
    zoo, mode = called_zoo(), FakeTensorMode(allow_non_fake_inputs=True)
    cached = {path: site.cached_delta.clone() for path, site in sites(zoo).items()}
    inputs = {kind: mode.from_tensor(x) for kind, x in inputs_of(zoo).items()}
    if whole_model:
        model = called_zoo()
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    tensors[name] = None if value is None else mode.from_tensor(value)
        loss_of(model(inputs)).backward()
    else:
        model = zoo
        with mode:
            loss_of(model(inputs)).backward()
    for name, parameter in trainable(model).items():
        assert isinstance(parameter.grad, FakeTensor) and parameter.grad.shape == parameter.shape, name
    assert all(torch.equal(site.cached_delta, cached[path]) for path, site in sites(zoo).items())
    # The real model is none the wiser.
    zoo.zero_grad()
    loss_of(zoo(inputs_of(zoo))).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(zoo).values())


def test_attaching_under_fake_tensors_is_refused() -> None:
    mode, zoo = FakeTensorMode(allow_non_fake_inputs=True), LinearZoo(["row"])
    with mode, pytest.raises(ValueError, match=r"^row: found a fake base weight, or a tracer or FakeTensorMode around"):
        dora_fx.DoRA(["row"], dim=DIM)(zoo)
    zoo.row.weight = nn.Parameter(mode.from_tensor(zoo.row.weight.detach()))
    with pytest.raises(ValueError, match=r"^row: found a fake base weight"):
        dora_fx.DoRA(["row"], dim=DIM)(zoo)
