"""Gradients that are completed once per step are those of one rank, with all that Megatron does to gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.oracle import run_oracle
from tests.distributed.test_same_function_everywhere import bound_of, error_of
from tests.distributed.training import TRAINED, Mode, run_rank
from tests.distributed.zoo import Topology, layer_names

EAGER = Mode(complete_gradients="once_per_step")
OVERLAPPED = replace(EAGER, overlap_grad_reduce=True)
# Clipping measures the norm of gradients that must be complete by then.
CLIPPED = replace(OVERLAPPED, dtype=torch.float32, clip_grad=1.0, num_steps=3)
COMPILED = replace(OVERLAPPED, compiler="dora_fx_aot_eager", dropout=0.3, recompute=True, num_steps=3)
DISTRIBUTED = replace(OVERLAPPED, distributed_optimizer=True, dtype=torch.float32)
DISTRIBUTED_COMPILED = replace(DISTRIBUTED, compiler="dora_fx_aot_eager", overlap_grad_reduce=False, clip_grad=1.0)
BFLOAT16 = replace(OVERLAPPED, dtype=torch.bfloat16)
INDUCTOR = replace(OVERLAPPED, compiler="dora_fx_inductor", dtype=torch.float32)
# Another compiler has no leaves in its graphs, and completes gradients in each backward pass.
PLAIN_INDUCTOR = replace(OVERLAPPED, compiler="inductor", num_steps=3)

slow = pytest.mark.slow
CASES = [
    pytest.param(Topology(tp=2), [replace(EAGER, num_steps=3), COMPILED], id="tp2"),
    pytest.param(Topology(tp=2, sequence_parallel=True), [CLIPPED, replace(DISTRIBUTED, num_steps=3)], id="tp2-sp"),
    pytest.param(Topology(tp=2), [EAGER, OVERLAPPED, INDUCTOR, PLAIN_INDUCTOR, BFLOAT16], marks=slow, id="tp2-all"),
    pytest.param(
        Topology(tp=2, sequence_parallel=True),
        [EAGER, COMPILED, INDUCTOR, BFLOAT16],
        marks=slow,
        id="tp2-sp-all",
    ),
    pytest.param(
        Topology(tp=2, dp=2),
        [EAGER, OVERLAPPED, CLIPPED, COMPILED, DISTRIBUTED, DISTRIBUTED_COMPILED, BFLOAT16],
        marks=slow,
        id="tp2-dp2",
    ),
    pytest.param(
        Topology(tp=2, sequence_parallel=True, dp=2),
        [EAGER, OVERLAPPED, CLIPPED, COMPILED, DISTRIBUTED, DISTRIBUTED_COMPILED, BFLOAT16],
        marks=slow,
        id="tp2-sp-dp2",
    ),
    pytest.param(Topology(tp=4), [OVERLAPPED, COMPILED, CLIPPED], marks=slow, id="tp4"),
    pytest.param(Topology(tp=4, sequence_parallel=True), [OVERLAPPED, COMPILED, CLIPPED], marks=slow, id="tp4-sp"),
]


def wrong_quantities(mode: Mode, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Name -> error of what differs from one rank's."""
    if mode.distributed_optimizer:
        # A rank has its own part of the buffer of gradients.
        expected = {q: value for q, value in expected.items() if not q.endswith(tuple(f" d{name}" for name in TRAINED))}
    wrong = []
    for quantity, value in expected.items():
        error = error_of(found[quantity], value, mode.dtype)
        if not error <= bound_of(quantity, mode.dtype) and quantity != "replicas differ by":
            wrong.append(f"{mode}: {quantity} off by {error:.1e}, bound {bound_of(quantity, mode.dtype):.0e}")
    return wrong


@pytest.mark.parametrize(("topology", "modes"), CASES)
def test_equals_one_rank(topology, modes):
    names = tuple(layer_names(topology))
    oracle = run_ranks(run_oracle, 1, 1, [(mode, names) for mode in modes])
    found = run_ranks(run_rank, topology.world_size, topology.tp, topology, modes)
    wrong = []
    for mode, expected, results in zip(modes, oracle, found, strict=True):
        assert float(results["replicas differ by"]) == 0.0
        wrong += wrong_quantities(mode, expected, results)
    assert not wrong, "\n".join(wrong)
