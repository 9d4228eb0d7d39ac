"""A layer that computes something else on one rank, with collectives around it, is refused on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dora_fx
from tests.distributed.launch import run_ranks
from tests.distributed.zoo import LAYERS, Topology, layer_names

TRIED = ("column_bias_added", "column_gather_output", "row_bias_added", "row_bias_returned")


def refusal_maybe(model: nn.Module) -> str | None:
    try:
        dora_fx.DoRA(["*linear*"], dim=4)(model)
    except ValueError as error:
        return str(error)
    return None


def refusals_on_each_rank(topology: Topology) -> list[dict[str, str | None]]:
    """What is refused on each rank: right layers, and ones of which rank 1 returns one percent more."""
    found = {}
    for name in TRIED:
        for is_right in (True, False):
            linear = LAYERS[name][1](topology, torch.float32)
            for parameter in linear.parameters():
                nn.init.normal_(parameter)
            if not is_right and dist.get_rank() == 1:
                linear.forward = one_percent_more(linear.forward)
            found[f"{name} {is_right}"] = refusal_maybe(nn.ModuleDict({"linear": linear, "other": nn.Linear(4, 4)}))
    everywhere: list[Any] = [None] * 2
    dist.all_gather_object(everywhere, found)
    return everywhere


def one_percent_more(forward: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        output, *beside = forward(*args, **kwargs)
        return 1.01 * output, *beside

    return changed


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_rank_computes_something_else(sequence_parallel: bool) -> None:
    topology = Topology(tp=2, sequence_parallel=sequence_parallel)
    assert set(TRIED) <= set(layer_names(topology))
    first, second = run_ranks(refusals_on_each_rank, 2, 2, topology)
    assert first == second
    for case, message in first.items():
        is_right = case.endswith("True")
        assert is_right == (message is None), f"{case}: {message}"
        assert is_right or (message.startswith("linear: found a ") and "by up to 1.0e-02" in message)
