"""`compile_model` on models with experts: the numbers of eager code, in few graphs whatever the routing is."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from torch._dynamo.utils import counters

import dora_fx
from dora_fx.experts_compilation import compile_experts, moe_layers
from dora_fx.models import causal_mask
from tests.closeness import assert_close, rounding
from tests.distributed.launch import run_layout
from tests.distributed.moe_layers import COMPILED
from tests.distributed.pipeline_gpt import (
    LAYERS,
    ROUNDINGS_OF_A_STEP,
    VOCAB,
    Kind,
    Layout,
    attach,
    build_base,
    set_adapter_values,
)
from tests.megatron_checkpoint import without_cuda_generators

slow = pytest.mark.slow
KIND = Kind(experts=True, sequence_parallel=True)
# Sequence length and how many different tokens a batch has; experts get no token where there is one alone.
BATCHES = [(12, VOCAB), (12, VOCAB), (20, VOCAB), (8, 1), (16, 2)] * 4


@dataclass(frozen=True)
class Case:
    """A way to compile, and what is recomputed."""

    scope: str = "layer"
    recompute: str = ""
    most_graphs: int = 0

    def __str__(self) -> str:
        return "-".join(filter(None, (self.scope, self.recompute)))


def step(model: nn.Module, number: int) -> dict[str, torch.Tensor]:
    """Logits and gradients of a batch of this rank."""
    length, variety = BATCHES[number % len(BATCHES)]
    seed = 1000 * parallel_state.get_data_parallel_rank() + number
    tokens = torch.randint(0, variety, (2, length), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    logits = model(tokens, torch.arange(length).expand_as(tokens), causal_mask(length, "cpu"))
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def run_case(layout: Layout, case: Case) -> int:
    """Compare every batch with eager code; return the number of graphs."""
    torch._dynamo.reset()
    counters.clear()
    model: Any = attach(build_base(layout, KIND, num_layers=2))[0]
    set_adapter_values([model], layout)
    expected = [step(model, number) for number in range(len(BATCHES))]
    with contextlib.ExitStack() as stack:
        if case.recompute:
            stack.enter_context(without_cuda_generators())
            recompute(model, case.recompute)
        if case.scope == "experts":
            compile_experts(moe_layers(model.modules()), COMPILED)
        else:
            dora_fx.compile_model(model, case.scope, inner_compiler="aot_eager")
        for number, wanted in enumerate(expected):
            assert_close(step(model, number), wanted, rounding(torch.float32, ROUNDINGS_OF_A_STEP // LAYERS * 2))
    assert counters["dora_fx"]["sites_unmatched"] == 0
    return int(counters["dora_fx"]["graphs_compiled"])


def recompute(model: Any, what: str) -> None:
    config = model.config
    if what == "full":
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
        return
    config.recompute_granularity, config.recompute_modules = "selective", [what]
    for layer in model.decoder.layers:
        layer.mlp.moe_layer_recompute = True


def run(layout: Layout, case: Case) -> list[int]:
    """The numbers of graphs of all ranks."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, run_case(layout, case))
    return counts


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        # Five graphs of the experts that tokens are routed to, two of the shared one: of the first length and of any.
        (Layout(dp=2, ep=2), Case("experts", most_graphs=7)),
        # Seven more of what is around them.
        pytest.param(Layout(dp=2, ep=2), Case(most_graphs=14), marks=slow),
        # Experts run without gradients too, and with full recomputation the layer does.
        pytest.param(Layout(), Case(recompute="moe", most_graphs=21), marks=slow),
        pytest.param(Layout(), Case(recompute="full", most_graphs=28), marks=slow),
        pytest.param(Layout(tp=2, ep=2, etp=1), Case("model", "moe", most_graphs=28), marks=slow),
        pytest.param(Layout(tp=2, dp=2, ep=2), Case(most_graphs=14), marks=slow),
    ],
    ids=str,
)
def test_compiled_experts_are_those_of_eager_code(layout: Layout, case: Case) -> None:
    graphs = run_layout(run, layout, case)
    assert 0 < min(graphs) <= max(graphs) <= case.most_graphs, graphs
