"""A whole training step of tensor-parallel layers, recorded once on each rank and run several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.distributed.launch import run_ranks
from tests.distributed.zoo import FFN, SEQUENCE, Topology, Zoo, set_adapter_values, tp_rank

NAMES = ["column_bias_added", "row_bias_added", "column_gather_output"]


def three_losses(topology: Topology, records: bool) -> tuple[list[torch.Tensor], Zoo]:
    zoo = Zoo(topology, torch.float64, 0.0, NAMES)
    set_adapter_values(zoo, topology)
    generator = torch.Generator().manual_seed(3)
    inputs = {name: torch.randn(SEQUENCE, 2, FFN, dtype=torch.float64, generator=generator) for name in NAMES}
    for name, x in inputs.items():
        is_row, width = name.startswith("row"), zoo.layers[name].weight.shape[1]
        tokens = slice(None) if is_row or not topology.sequence_parallel else slice(tp_rank() * 4, tp_rank() * 4 + 4)
        start = tp_rank() * width if is_row else 0
        inputs[name] = x[tokens, :, start : start + width].contiguous()
    # Buffers are up to date, so that a recorder could keep them.
    zoo(inputs)
    parameters: list[Any] = [parameter for parameter in zoo.parameters() if parameter.requires_grad]

    def step(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        loss = torch.stack([(output - 1.0).square().mean() for output in zoo(inputs).values()]).sum()
        updated = [p - 0.2 * grad for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)]
        return [loss.detach(), *(value.detach() for value in updated)]

    call, losses = make_fx(step)(inputs) if records else step, []
    for _ in range(3):
        loss, *updated = call(inputs)
        losses.append(loss)
        with torch.no_grad():
            for parameter, value in zip(parameters, updated, strict=True):
                parameter.copy_(value)
    return losses, zoo


def recorded_steps(topology: Topology) -> None:
    expected, _ = three_losses(topology, records=False)
    found, zoo = three_losses(topology, records=True)
    assert_apart(expected[1], expected[0])
    bound = rounding(torch.float64, 6 * roundings_of(zoo))
    assert_close(dict(zip("123", found, strict=True)), dict(zip("123", expected, strict=True)), bound)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_recorded_step_on_two_ranks(sequence_parallel: bool) -> None:
    run_ranks(recorded_steps, 2, 2, Topology(tp=2, sequence_parallel=sequence_parallel))
