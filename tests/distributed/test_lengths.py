"""Every layout computes the same at any length and batch size, however sizes reach the compiler, in few graphs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn
from torch._dynamo.utils import counters

import dora_fx
from tests.distributed.launch import run_ranks
from tests.distributed.zoo import DIM, FFN, HIDDEN, Topology, make_config
from tests.models import randomize_adapters

LENGTHS, BATCHES = (8, 12, 20), (2, 3)
FIRST_LENGTHS = 2


def column(sequence_parallel: bool, **kwargs: Any) -> nn.Module:
    config = make_config(Topology(2, sequence_parallel), torch.float64)
    return ColumnParallelLinear(HIDDEN, FFN, config=config, init_method=nn.init.normal_, **kwargs)


def row(sequence_parallel: bool, **kwargs: Any) -> nn.Module:
    config = make_config(Topology(2, sequence_parallel), torch.float64)
    settings = dict(config=config, init_method=nn.init.normal_, bias=True, input_is_parallel=True, skip_bias_add=False)
    return RowParallelLinear(FFN, HIDDEN, **(settings | kwargs))


class Layer(NamedTuple):
    """A layer of one layout: its builder, the features of this rank's input, the part of the sequence that it gets."""

    build: Callable[[], nn.Module]
    features: int
    sequence_shards: int = 1


LAYERS = {
    "replicated": Layer(lambda: nn.Linear(HIDDEN, FFN, dtype=torch.float64), HIDDEN),
    "column": Layer(lambda: column(False), HIDDEN),
    "column_sequence_parallel": Layer(lambda: column(True), HIDDEN, 2),
    "column_gather_output": Layer(lambda: column(False, gather_output=True), HIDDEN),
    "column_sequence_parallel_gather_output": Layer(lambda: column(True, gather_output=True), HIDDEN, 2),
    "row": Layer(lambda: row(False), FFN // 2),
    "row_sequence_parallel": Layer(lambda: row(True), FFN // 2),
    "row_split_input": Layer(lambda: row(False, input_is_parallel=False), FFN),
}
# How sizes reach the compiler: torch.compile's `dynamic`, and whether each input is marked.
SIZES: dict[str, tuple[bool | None, bool]] = {
    "static": (False, False),
    "automatic": (None, False),
    "marked": (None, True),
    "dynamic": (True, False),
}
RUNS = ("train", "train_with_dropout", "eval", "no_grad", "inference_mode")


@contextlib.contextmanager
def run_mode(model: nn.Module, name: str) -> Iterator[None]:
    model.train(name.startswith("train"))
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(name, contextlib.nullcontext)
    with mode():
        yield


def results(model: nn.Module, call: Callable[..., Any], x: torch.Tensor, name: str) -> list[torch.Tensor]:
    """Output, and in training the gradients of the input and the adapter."""
    torch.manual_seed(3)
    returned = call(x)
    output = returned[0] if isinstance(returned, tuple) else returned
    if not name.startswith("train"):
        return [output]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad((output * output).sum(), [x, *parameters])]


def worst_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference, relative to the largest element of what it is in."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in zip(found, expected, strict=True)
    )


def compare(layer_name: str, sizes: str, run: str) -> tuple[float, int]:
    """The worst error against the eager layer, and the graphs compiled after the second length."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, dropout = LAYERS[layer_name], 0.25 if run == "train_with_dropout" else 0.0
    model = dora_fx.DoRA(["linear"], dim=DIM, dropout=dropout)(nn.ModuleDict({"linear": layer.build()}))["linear"]
    randomize_adapters(model)
    dynamic, is_marked = SIZES[sizes]
    options = {"inner_compiler": "aot_eager", "rank_timeout": 60.0}
    compiled = torch.compile(model, backend="dora_fx", options=options, fullgraph=True, dynamic=dynamic)
    counters.clear()
    error, graphs_before = 0.0, 0
    with run_mode(model, run):
        for number, (batch, length) in enumerate(itertools.product(BATCHES, LENGTHS)):
            x = torch.randn(length // layer.sequence_shards, batch, layer.features, dtype=torch.float64)
            x.requires_grad_(run.startswith("train"))
            expected = results(model, model, x, run)
            if is_marked:
                for dim in (0, 1):
                    torch._dynamo.mark_dynamic(x, dim)
            error = max(error, worst_error(results(model, compiled, x, run), expected))
            if number == FIRST_LENGTHS - 1:
                graphs_before = counters["dora_fx"]["graphs_compiled"]
    assert counters["dora_fx"]["sites_unmatched"] == 0
    return error, counters["dora_fx"]["graphs_compiled"] - graphs_before


def compare_all(cases: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], tuple[float, int]]:
    return {case: compare(*case) for case in cases}


def check(cases: Sequence[tuple[str, str, str]]) -> None:
    for case, (error, recompilations) in run_ranks(compare_all, 2, 2, cases).items():
        # Sums of some hundred float64 terms, in another order.
        assert error <= 1e-12, case
        assert "static" in case or recompilations <= 1, case


def test_every_layout_at_every_length() -> None:
    """Each way of running and each way that sizes take to the compiler, with one layout or another."""
    ways = itertools.cycle(itertools.product(("automatic", "marked", "dynamic"), RUNS))
    check([(layer, *next(ways)) for layer in LAYERS for _ in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
def test_the_whole_matrix(sizes: str) -> None:
    check([(layer, sizes, run) for layer in LAYERS for run in RUNS])
