"""A whole adapted GPT: against the oracle, number of graphs, causality, sequence lengths, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import dora_fx
from tests.closeness import assert_close, relative_error, rounding, roundings_of
from tests.models import (
    GPT_TARGETS,
    SEQUENCE,
    logits_of,
    randomize_adapters,
    sites,
    tiny_gpt,
    token_ids,
    trainable,
)
from tests.oracle import put_reference_into

pytestmark = pytest.mark.usefixtures("world")

AOT_EAGER = {"backend": "dora_fx", "options": {"inner_compiler": "aot_eager"}}


def adapted_gpt(*, dropout: float = 0.0, targets: list[str] = GPT_TARGETS, **kwargs: Any) -> nn.Module:
    model = dora_fx.DoRA(targets, dim=6, alpha=12, dropout=dropout)(tiny_gpt(**kwargs))
    randomize_adapters(model)
    return model


def results(model: nn.Module, call: Callable[..., torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and all gradients of a loss that every logit takes part in."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = logits_of(call, tokens)
    (0.5 * logits.square()).mean().backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize(
    ("settings", "dropout", "tied"),
    [
        (None, 0.0, True),
        (None, 0.0, False),
        (None, 0.25, True),
        (None, 0.25, False),
        (AOT_EAGER, 0.0, False),
        (AOT_EAGER, 0.25, True),
    ],
    ids=lambda value: "dora_fx(aot_eager)" if isinstance(value, dict) else str(value),
)
def test_against_the_oracle(
    settings: dict[str, Any] | None, dropout: float, tied: bool, record_error: Callable[..., None]
) -> None:
    torch.manual_seed(2)
    twin = tiny_gpt(tied=tied).double().requires_grad_(False)
    torch.manual_seed(2)
    model = adapted_gpt(tied=tied, targets=[*GPT_TARGETS, "output_layer"], dropout=dropout).double()
    randomize_adapters(model)
    put_reference_into(twin, model)
    expected = results(twin, twin, token_ids())
    call = model if settings is None else torch.compile(model, fullgraph=True, **settings)
    found = results(model, call, token_ids())
    renamed = {name: found[_product_name(name)] for name in expected}
    compiler = "eager" if settings is None else "dora_fx(aot_eager)"
    for name, value in expected.items():
        record_error("whole GPT", compiler, torch.float64, relative_error(renamed[name], value))
    assert_close(renamed, expected, 1e-12)


def _product_name(name: str) -> str:
    for reference_name, product_name in (
        (".lora_a", ".adapter.linear_in.weight"),
        (".lora_b", ".adapter.linear_out.weight"),
        (".magnitude", ".adapter.weight_magnitude"),
    ):
        name = name.replace(reference_name, product_name)
    return name


def test_one_graph_and_every_site_rewritten() -> None:
    model = adapted_gpt(targets=[*GPT_TARGETS, "output_layer"])
    counters.clear()
    expected = results(model, model, token_ids())
    found = results(model, torch.compile(model, fullgraph=True, **AOT_EAGER), token_ids())
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["total"] == counters["aot_autograd"]["ok"] == 1
    assert counters["dora_fx"]["sites_rewritten"] == len(sites(model)) == 9
    assert_close(found, expected, rounding(torch.float32, 3 * roundings_of(model)))


def test_layer_by_layer_compilation_shares_graphs() -> None:
    """The first layer's input needs no gradient, the others' does: two signatures, two graphs."""
    model = adapted_gpt(num_layers=4)
    expected = results(model, model, token_ids())
    counters.clear()
    for layer in model.decoder.layers:
        layer.compile(fullgraph=True, **AOT_EAGER)
    found = results(model, model, token_ids())
    assert counters["stats"]["unique_graphs"] == 2
    assert counters["dora_fx"]["sites_rewritten"] == 2 * len(GPT_TARGETS)
    assert_close(found, expected, rounding(torch.float32, 3 * roundings_of(model)))


def test_eight_sequence_lengths_take_one_recompilation() -> None:
    model = adapted_gpt()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, **AOT_EAGER)
    # The longest first: Megatron's attention has a scratch buffer that grows, and Dynamo guards on its size.
    for length in (28, 14, 16, 12, 20, 26, 18, 22):
        tokens = token_ids(length)
        found, expected = results(model, compiled, tokens), results(model, model, tokens)
        assert_close(found, expected, rounding(torch.float32, 3 * roundings_of(model)))
    assert counters["stats"]["unique_graphs"] <= 2
    assert counters["dora_fx"]["graphs_compiled"] <= 2


@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_causal(grad: bool) -> None:
    """The base alone is Megatron's, and compiles to itself as the next test sees."""
    model = adapted_gpt().train(grad)
    compiled = torch.compile(model, fullgraph=True, **AOT_EAGER)
    tokens = token_ids()
    with torch.set_grad_enabled(grad):
        before = logits_of(compiled, tokens).detach()
        for position in (1, SEQUENCE // 2, SEQUENCE - 1):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % 64
            after = logits_of(compiled, changed).detach()
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
def test_model_without_sites_compiles_to_itself(inner_compiler: str) -> None:
    model = tiny_gpt()
    compiled = torch.compile(model, backend="dora_fx", options={"inner_compiler": inner_compiler}, fullgraph=True)
    counters.clear()
    expected, found = results(model, model, token_ids()), results(model, compiled, token_ids())
    assert counters["dora_fx"]["sites_rewritten"] == 0
    assert counters["dora_fx"]["graphs_compiled"] == 1
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def recompute_layers(model: nn.Module) -> None:
    """Recompute every decoder layer in the backward pass."""
    for layer in model.decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@pytest.mark.parametrize(
    ("settings", "dropout"),
    [(None, 0.0), (None, 0.25), (AOT_EAGER, 0.25)],
    ids=lambda value: "dora_fx(aot_eager)" if isinstance(value, dict) else str(value),
)
# TransformerLayer assigns to an attribute of its own in forward; Dynamo lets a recomputed region do so on request.
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_recomputation_changes_nothing(settings: dict[str, Any] | None, dropout: float) -> None:
    model = adapted_gpt(dropout=dropout)
    expected = results(model, model, token_ids())
    recompute_layers(model)
    call = model if settings is None else torch.compile(model, fullgraph=True, **settings)
    counters.clear()
    found = results(model, call, token_ids())
    assert_close(found, expected, 0.0 if settings is None else rounding(torch.float32, 3 * roundings_of(model)))
    if settings is not None:
        assert counters["dora_fx"]["sites_rewritten"] == len(sites(model))
