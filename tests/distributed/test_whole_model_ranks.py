"""A whole GPT is one graph on every tensor-parallel rank, and its gradients are those of the eager model."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters

import dora_fx
from tests.closeness import relative_error
from tests.distributed.launch import run_ranks
from tests.distributed.zoo import Topology, set_adapter_values
from tests.models import GPT_TARGETS, logits_of, tiny_gpt, token_ids, trainable

TOPOLOGY = Topology(tp=2)


def gradients(model: Any, function: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits_of(function, token_ids()).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def compile_whole() -> tuple[int, int, float]:
    """Graphs, rewritten sites, and the largest relative difference of a gradient from the eager model's."""
    model = tiny_gpt(tensor_model_parallel_size=TOPOLOGY.tp, params_dtype=torch.float64)
    dora_fx.DoRA([*GPT_TARGETS, "output_layer"], dim=4, alpha=8)(model)
    set_adapter_values(model, TOPOLOGY)
    expected = gradients(model, model)
    counters.clear()
    options = {"inner_compiler": "aot_eager"}
    found = gradients(model, torch.compile(model, backend="dora_fx", options=options, fullgraph=True))
    worst = max(relative_error(found[name], value) for name, value in expected.items())
    return counters["stats"]["unique_graphs"], counters["dora_fx"]["sites_rewritten"], worst


def test_a_whole_model_on_two_ranks_is_one_graph():
    num_graphs, num_sites, worst = run_ranks(compile_whole, TOPOLOGY.world_size, TOPOLOGY.tp)
    assert (num_graphs, num_sites) == (1, 9)
    assert worst <= 1e-12
