"""Sequence-parallel column layers, whose ranks multiply A by their own tokens, equal one rank to 1e-13 in float64.

Beside `test_same_function_everywhere.py`, which runs all layers: compiled and eager, with and without dropout, with A's
gradient completed in each backward pass and once per step, recomputed, with the output gathered.
"""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.oracle import run_oracle
from tests.distributed.test_same_function_everywhere import error_of
from tests.distributed.training import Mode, run_rank
from tests.distributed.zoo import Topology

NAMES = ("column_bias_added", "column_gather_output", "gated_mlp")
TE_NAMES = ("te_norm_column_rms_centered", "te_norm_column_layer", "te_column_bias_added")
COMPILED = "dora_fx_aot_eager"
# Outputs and gradients are of the first step, over two micro-batches.
SAMPLE = [
    Mode(num_steps=1, dropout=0.3, recompute=True),
    Mode(num_steps=1, compiler=COMPILED, complete_gradients="every_backward"),
]
ALL = [
    *SAMPLE,
    Mode(num_steps=1, complete_gradients="every_backward"),
    Mode(num_steps=1, recompute=True),
    Mode(num_steps=1, compiler=COMPILED, dropout=0.3, recompute=True),
]
CASES = [
    pytest.param(2, SAMPLE, id="sample"),
    pytest.param(2, ALL, id="all", marks=pytest.mark.slow),
    pytest.param(4, ALL[-1:], id="four ranks", marks=pytest.mark.slow),
]
BOUND = 1e-13
# The second words of what `TrainingRun.results` calls its outputs and gradients.
QUANTITIES = {"y", "dx", "dlora_a", "dlora_b", "dmagnitude"}


@pytest.mark.parametrize(("tp", "modes"), CASES)
def test_outputs_and_gradients_equal_one_rank(tp, modes):
    assert_equal_one_rank(tp, modes, NAMES)


@pytest.mark.usefixtures("emulated_te")
@pytest.mark.parametrize(("tp", "modes"), CASES)
def test_outputs_and_gradients_equal_one_rank_emulated_kernels(tp, modes):
    assert_equal_one_rank(tp, modes, TE_NAMES)


def assert_equal_one_rank(tp: int, modes: list[Mode], names: tuple[str, ...]) -> None:
    topology = Topology(tp=tp, sequence_parallel=True)
    oracle = run_ranks(run_oracle, 1, 1, [(mode, names) for mode in modes])
    found = run_ranks(run_rank, topology.world_size, tp, topology, modes, names)
    wrong = []
    for mode, expected, results in zip(modes, oracle, found, strict=True):
        errors = {
            quantity: error_of(results[quantity], value, mode.dtype)
            for quantity, value in expected.items()
            # "loss" and "grad_norm" are one word; weights have "initial:" or "after" there.
            if quantity.split()[1:2] and quantity.split()[1] in QUANTITIES
        }
        assert {quantity.split()[1] for quantity in errors} == QUANTITIES
        print(f"{mode} {mode.complete_gradients}: at most {max(errors.values()):.1e}")
        wrong += [f"{mode}: {quantity} off by {error:.1e}" for quantity, error in errors.items() if not error <= BOUND]
    assert not wrong, "\n".join(wrong)
