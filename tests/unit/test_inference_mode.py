"""Whatever was first done in inference mode, training goes on afterwards: all tensors that are stored are ordinary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dora_fx
from tests.models import DIM, GPT_TARGETS, IN, LinearZoo, adapt_zoo, logits_of, sites, tiny_gpt, token_ids, trainable

pytestmark = pytest.mark.usefixtures("world")


def adapt(model: nn.Module) -> None:
    dora_fx.DoRA(GPT_TARGETS, dim=DIM)(model)


def call(model: nn.Module) -> None:
    logits_of(model, token_ids())


def call_merged(model: nn.Module) -> None:
    with dora_fx.merged(model):
        call(model)


def change_alpha(model: nn.Module) -> None:
    for site in sites(model).values():
        site.adapter.alpha = 3.0


def cast_layers(model: nn.Module) -> None:
    for site in sites(model).values():
        site.double().float()


def forget_norms(model: nn.Module) -> None:
    dora_fx.invalidate_norms(model)


def merge_and_undo(model: nn.Module) -> None:
    dora_fx.unmerge(dora_fx.merge(model, keep_adapter=True))


@pytest.mark.parametrize(
    "steps",
    [[adapt], [call_merged], [change_alpha], [cast_layers], [forget_norms], [merge_and_undo]],
    ids=lambda steps: "_".join(step.__name__ for step in steps),
)
def test_what_is_done_in_inference_mode_leaves_ordinary_tensors(steps: list[Callable[[nn.Module], None]]) -> None:
    model = tiny_gpt(num_layers=1)
    if adapt not in steps:
        adapt(model)
    # Megatron keeps rotary positions from call to call, made in whatever mode the first one is.
    call(model)
    with torch.inference_mode():
        for step in steps:
            step(model)
        call(model)
    kept = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in kept if tensor.is_inference()] == []
    check_training(model)


def check_training(model: nn.Module) -> None:
    """Train for two steps; every adapter gets a gradient."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits_of(model, token_ids()).square().mean().backward()
        assert [name for name, parameter in trainable(model).items() if parameter.grad is None] == []
        optimizer.step()


@pytest.mark.parametrize("scope", ["layer", "model", "backend"])
def test_a_compiled_model_is_first_called_in_inference_mode(scope: str) -> None:
    model = tiny_gpt(num_layers=1)
    adapt(model)
    if scope == "backend":
        model.compile(backend="dora_fx", options={"inner_compiler": "aot_eager"})
    else:
        dora_fx.compile_model(model, scope, inner_compiler="aot_eager")
    with torch.inference_mode():
        call(model)
    check_training(model)


def test_a_base_that_was_made_in_inference_mode_is_named_when_it_is_trained() -> None:
    with torch.inference_mode():
        zoo = LinearZoo(["row"])
    adapt_zoo(zoo)
    x = {"row": torch.randn(3, IN)}
    with torch.inference_mode():
        expected = zoo(x)["row"]
    call = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "eager"})
    for forward in (zoo, call):
        with pytest.raises(ValueError, match=r"row: found a weight that was made under torch\.inference_mode\(\)"):
            forward(x)
    zoo.row.to_wrap.weight = nn.Parameter(zoo.row.to_wrap.weight.detach().clone(), requires_grad=False)
    found = zoo(x)["row"]
    found.sum().backward()
    assert torch.equal(found.detach(), expected)
