"""The optimizer of a run is AdamW as the options say, step by step."""

from __future__ import annotations

import pytest
import torch

from dora_fx import DoRA
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.app.training.adapter_optimizer import AdapterOptimizer
from tests.closeness import assert_close, rounding
from tests.hf_models import tiny_hf_model
from tests.models import trainable
from tests.peft_models import megatron_of


@pytest.mark.usefixtures("world")
def test_decays_and_epsilon_are_those_of_the_options() -> None:
    """Two steps against the formula in float64; the second is where the decays show, and epsilon is no small part."""
    settings = dict(adam_beta1=0.5, adam_beta2=0.75, adam_eps=0.3)
    model = DoRA(dim=4, alpha=8)(megatron_of(tiny_hf_model(num_hidden_layers=1)))
    optimizer = AdapterOptimizer(model, FinetuneOptions(demo="text", max_grad_norm=0.0, **settings), "cpu")
    parameters = trainable(model)
    start = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    gradients = [{name: torch.randn_like(each) for name, each in parameters.items()} for _ in range(2)]
    for of_a_step in gradients:
        optimizer.clear_gradients()
        for name, parameter in parameters.items():
            parameter.main_grad.copy_(of_a_step[name])
        optimizer.complete_gradients()
        optimizer.step(0.1)
    for name, parameter in parameters.items():
        moved = parameter.detach().double() - start[name]
        of_steps = [of_a_step[name].double() for of_a_step in gradients]
        assert_close(moved, -0.1 * adam(of_steps, 0.5, 0.75, 0.3), rounding(torch.float32, 64))


def adam(gradients: list[torch.Tensor], beta1: float, beta2: float, eps: float) -> torch.Tensor:
    """The sum of Adam's updates, as in algorithm 1 of arXiv 1412.6980."""
    mean = square = total = torch.zeros_like(gradients[0])
    for step, gradient in enumerate(gradients, start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        total = total + mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
    return total
