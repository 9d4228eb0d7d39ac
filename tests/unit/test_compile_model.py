"""`compile_model`: the same numbers with few graphs, and no setting of Dynamo before it is called."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn
from torch._dynamo.utils import counters

import dora_fx
from tests.closeness import assert_close, rounding, roundings_of
from tests.models import GPT_TARGETS, logits_of, randomize_adapters, tiny_gpt, token_ids, trainable
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

SCOPES = ["layer", "model"]


def adapted_gpt(**kwargs: Any) -> nn.Module:
    model = dora_fx.DoRA(GPT_TARGETS, dim=6, alpha=12)(tiny_gpt(**kwargs))
    randomize_adapters(model)
    return model


def gradients(model: nn.Module, call: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits_of(call, tokens).square().mean().backward()
    # Megatron's DDP keeps them in buffers of its own.
    return {name: (p.main_grad if p.grad is None else p.grad).clone() for name, p in trainable(model).items()}


def assert_all_close(model: nn.Module, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert_close(found[name], value, rounding(torch.float32, 3 * roundings_of(model)))


def ddp(model: Any) -> nn.Module:
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def in_list(model: Any) -> list[Any]:
    return [model]


# A list is taken apart before the scope is looked at.
@pytest.mark.parametrize(
    ("scope", "wrap"),
    [
        ("layer", lambda model: model),
        ("model", lambda model: model),
        ("layer", in_list),
        ("layer", ddp),
        ("model", ddp),
    ],
    ids=["layer-bare", "model-bare", "layer-list", "layer-ddp", "model-ddp"],
)
def test_computes_what_the_model_does(scope: Any, wrap: Any) -> None:
    model = adapted_gpt(num_layers=3)
    tokens = token_ids()
    expected = gradients(model, model, tokens)
    wrapped = wrap(model)
    counters.clear()
    assert dora_fx.compile_model(wrapped, scope, inner_compiler="aot_eager") is wrapped
    found = gradients(model, wrapped[0] if isinstance(wrapped, list) else wrapped, tokens)
    assert counters["dora_fx"]["graphs_compiled"] == 1
    assert counters["dora_fx"]["sites_rewritten"] == len(GPT_TARGETS) * (1 if scope == "layer" else 3)
    assert_all_close(model, found, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_lengths_and_batches_that_grow_take_one_more_graph(scope: Any) -> None:
    model = adapted_gpt()
    shapes = [(2, 12), (2, 14), (3, 18), (3, 20), (4, 28)]
    batches = [token_ids(length, batch) for batch, length in shapes]
    expected = [gradients(model, model, tokens) for tokens in batches]
    counters.clear()
    dora_fx.compile_model(model, scope, inner_compiler="aot_eager")
    for tokens, grads in zip(batches, expected, strict=True):
        assert_all_close(model, gradients(model, model, tokens), grads)
    assert counters["dora_fx"]["graphs_compiled"] <= 3


def test_adapters_attached_afterwards_are_compiled() -> None:
    model, tokens = tiny_gpt(), token_ids()
    dora_fx.compile_model(model, inner_compiler="aot_eager")
    with torch.no_grad():
        logits_of(model, tokens)
    counters.clear()
    dora_fx.DoRA(GPT_TARGETS, dim=4)(model)
    with torch.no_grad():
        logits_of(model, tokens)
    assert counters["dora_fx"]["sites_rewritten"] == len(GPT_TARGETS)


@every_case(
    ("model", "settings", "error"),
    [
        (tiny_gpt, {"scope": "layers"}, r"scope: found 'layers', expected one of \['layer', 'model'\]"),
        (tiny_gpt, {"inner_compiler": "tvm"}, "inner_compiler: found 'tvm'"),
        (tiny_gpt, {"fallback_randm": True}, "unknown option 'fallback_randm'"),
        (tiny_gpt, {"mode": "fastest"}, "mode: found 'fastest'"),
        (tiny_gpt, {"mode": "max-autotune", "inner_compiler": "eager"}, "takes no Inductor settings"),
        (lambda: nn.Linear(2, 2), {}, "found no transformer layer in a Linear"),
        (lambda: dora_fx.compile_model(tiny_gpt()), {}, "found a GPTModel that is compiled already"),
    ],
)
def test_refusals_change_nothing(model: Any, settings: dict[str, Any], error: str) -> None:
    model = model()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=error):
        dora_fx.compile_model(model, **settings)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert "forward" not in vars(model)


def test_importing_and_attaching_leave_dynamo_alone() -> None:
    program = """
import copy
from torch._dynamo import config
def settings():
    return copy.deepcopy({name: value for name, value in config.get_config_copy().items()})
import megatron.core.models.gpt
before = settings()
import dora_fx
from torch import nn
model = dora_fx.DoRA(["0"], dim=2)(nn.Sequential(nn.Linear(4, 4)))
assert settings() == before
import dora_fx.backend
assert settings() != before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
