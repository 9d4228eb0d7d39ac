"""Models as people bring them to the compiler: hooks, threads, many ranks and alphas, symbolic numbers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx.passes.rewrite_dora_pass import _warn_once
from tests.closeness import assert_apart, assert_close
from tests.models import IN, LINEAR_KINDS, LinearZoo, adapt_zoo, randomize_adapters, sites, trainable

pytestmark = pytest.mark.usefixtures("world")

KINDS = ["column_bias_added", "row_bias_added", "linear_bias"]
OPTIONS = {"inner_compiler": "aot_eager"}


def run_and_differentiate(call: Callable[..., Any], zoo: LinearZoo) -> list[torch.Tensor]:
    """Outputs of every layer of a zoo, gradients of its inputs and its adapters."""
    generator = torch.Generator().manual_seed(2)
    inputs = {kind: torch.randn(5, IN, generator=generator, dtype=torch.float64) for kind in zoo.kinds}
    leaves = {kind: x.requires_grad_() for kind, x in inputs.items()}
    torch.manual_seed(3)
    outputs = call(leaves)
    wanted = [*leaves.values(), *trainable(zoo).values()]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs.values()), wanted)
    return [*outputs.values(), *gradients]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert_close(*({str(index): tensor for index, tensor in enumerate(part)} for part in (found, expected)), 1e-12)


def item(module: nn.Module, args: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).sum().item()


def graph_break(module: nn.Module, args: Any, output: Any) -> None:
    torch._dynamo.graph_break()


def halve(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


def look_at_gradients(module: nn.Module, *gradients: Any) -> None:
    assert gradients


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "item": lambda base: base.register_forward_hook(item),
    "graph break": lambda base: base.register_forward_hook(graph_break),
    "changed output": lambda base: base.register_forward_hook(halve),
    "full backward": lambda base: base.register_full_backward_hook(look_at_gradients),
    "full backward pre": lambda base: base.register_full_backward_pre_hook(look_at_gradients),
    "disabled": lambda base: setattr(base, "forward", torch._dynamo.disable(base.forward)),
}


# In turn with and without dropout, which is in the site's own code and not in the base call that cannot be read.
@pytest.mark.parametrize(
    ("hook", "dropout"), zip(HOOKS.values(), [0.25, 0.0] * (len(HOOKS) // 2), strict=True), ids=HOOKS
)
def test_a_base_layer_that_cannot_be_read(
    hook: Callable[[nn.Module], Any], dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The result is that of eager code, one warning names each layer, and norms are cached all the same."""
    _warn_once.cache_clear()
    zoo = adapt_zoo(LinearZoo(KINDS).double(), dropout=dropout)
    for site in sites(zoo).values():
        hook(site.to_wrap)
    expected = run_and_differentiate(zoo, zoo)
    compiled = torch.compile(zoo, backend="dora_fx", options=OPTIONS)
    counters.clear()
    with caplog.at_level(logging.WARNING, logger="dora_fx"):
        for _ in range(2):
            assert_same(run_and_differentiate(compiled, zoo), expected)
    assert counters["dora_fx"]["sites_unmatched"] == len(KINDS)
    for kind in KINDS:
        [warning] = [line for line in caplog.messages if line.startswith(f"{kind}: ")]
        assert "cannot be joined with its base layer" in warning and "exact and costs" in warning
    assert [site.cached_delta._version for site in sites(zoo).values()] == [1] * len(KINDS)


@pytest.mark.parametrize("hook", [HOOKS["item"], HOOKS["changed output"]], ids=["item", "changed output"])
def test_an_unmatched_layer_is_an_error_on_request(hook: Callable[[nn.Module], Any]) -> None:
    zoo = adapt_zoo(LinearZoo(["row_bias_added"]).double())
    hook(zoo.row_bias_added.to_wrap)
    compiled = torch.compile(zoo, backend="dora_fx", options=OPTIONS | {"unmatched": "error"})
    with pytest.raises(BackendCompilerFailed, match=r"row_bias_added: DoRA cannot be joined .*"):
        run_and_differentiate(compiled, zoo)


def test_two_training_threads() -> None:
    zoo = adapt_zoo(LinearZoo(KINDS).double())
    expected = run_and_differentiate(zoo, zoo)
    compiled = torch.compile(zoo, backend="dora_fx", options=OPTIONS)
    found: list[list[torch.Tensor]] = []

    def train() -> None:
        # Both threads draw from the same generator, but nothing here is random.
        found.extend(run_and_differentiate(compiled, zoo) for _ in range(2))

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for results in found:
        assert_same(results, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["column_bias_added", "row_split_input", "linear", "column_gather_output"])
def test_symbolic_numbers(kind: str, dropout: float) -> None:
    """`dynamic=True` makes symbols of a module's numbers too, alpha and dropout among them."""
    zoo = adapt_zoo(LinearZoo([kind]).double(), dropout=dropout)
    compiled = torch.compile(zoo, backend="dora_fx", options=OPTIONS, fullgraph=True, dynamic=True)
    assert_same(run_and_differentiate(compiled, zoo), run_and_differentiate(zoo, zoo))


def layers_of(settings: list[dict[str, Any]]) -> list[nn.Module]:
    """One linear layer for each set of DoRA's settings, compiled by itself."""
    layers = []
    for setting in settings:
        model = nn.ModuleDict({"linear": LINEAR_KINDS["linear"]()}).double()
        layer = dora_fx.DoRA(["linear"], **({"dim": 4} | setting))(model)["linear"]
        randomize_adapters(layer)
        layer.compile(backend="dora_fx", options=OPTIONS, fullgraph=True)
        layers.append(layer)
    return layers


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ([{"alpha": 4.0 + alpha} for alpha in range(12)], 1),
        ([{"dropout": 0.05 * (1 + step)} for step in range(12)], 1),
        ([{"dim": 1 + dim} for dim in range(12)], 12),
    ],
    ids=["alphas", "dropouts", "ranks"],
)
def test_many_settings_in_one_model(settings: list[dict[str, Any]], graphs: int) -> None:
    layers = layers_of(settings)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    counters.clear()
    for layer in layers:
        outputs = []
        for call in (layer, layer.forward):
            torch.manual_seed(4)
            outputs.append(call(x))
        assert_close(*outputs, 1e-12)
    assert counters["dora_fx"]["graphs_compiled"] == graphs


def test_alpha_and_dropout_may_be_changed_later() -> None:
    [layer] = layers_of([{"dropout": 0.1}])
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    seen = []
    for alpha, dropout in ((8.0, 0.1), (2.0, 0.5), (2.0, 0.0)):
        layer.adapter.alpha, layer.adapter.dropout = alpha, dropout
        torch.manual_seed(4)
        seen.append(layer(x))
        torch.manual_seed(4)
        assert_close(seen[-1], layer.forward(x), 1e-12)
    assert_apart(seen[0], seen[1])
    assert_apart(seen[1], seen[2])
    with pytest.raises(ValueError, match=r"dropout: found 1.0, expected a probability in \[0, 1\)"):
        layer.adapter.dropout = 1.0


@pytest.mark.parametrize("weight_norm", ["once_per_step", "every_call"])
def test_is_compiled_within_a_checkpoint(weight_norm: str) -> None:
    """It must save in its first call, which compiles, what it saves when it is recomputed."""
    zoo = adapt_zoo(LinearZoo(KINDS).double(), dropout=0.25)
    call = torch.compile(zoo, backend="dora_fx", options={**OPTIONS, "weight_norm": weight_norm}, fullgraph=True)
    found = run_and_differentiate(lambda leaves: checkpoint(call, leaves, use_reentrant=False), zoo)
    assert_same(found, run_and_differentiate(zoo, zoo))
