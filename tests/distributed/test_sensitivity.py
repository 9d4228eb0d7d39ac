"""The harness notices every fault of a list that is planted in the library's own code."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.mutations import MUTATIONS, planted
from tests.distributed.oracle import run_oracle
from tests.distributed.test_same_function_everywhere import GRAD_NORM_TOLERANCE, TOLERANCE, relative_error
from tests.distributed.training import Mode, TrainingRun
from tests.distributed.zoo import Topology

NAMES = ("column_bias_added", "row_bias_added", "gated_mlp")
MODES = [
    Mode(num_steps=2),
    Mode(dropout=0.3, num_steps=1),
    Mode(compiler="dora_fx_eager", num_steps=1),
]


def catch(topology: Topology, oracle: list[dict]) -> dict[str, str | None]:
    """Mutation -> the first quantity that betrays it, None where none does. Runs on every rank alike."""
    caught = {"none planted": first_wrong(topology, oracle)}
    for mutation in MUTATIONS:
        with planted(mutation):
            caught[mutation.name] = first_wrong(topology, oracle)
    return caught


def first_wrong(topology: Topology, oracle: list[dict]) -> str | None:
    for mode, expected in zip(MODES, oracle, strict=True):
        try:
            results = TrainingRun(topology, mode, NAMES).results()
        except RuntimeError as error:
            return f"{mode}: {type(error).__name__}"
        if float(results["replicas differ by"]) > 0.0:
            return f"{mode}: replicas differ"
        for quantity, value in expected.items():
            bound = GRAD_NORM_TOLERANCE if quantity == "grad_norm" else TOLERANCE[mode.dtype]
            if quantity != "replicas differ by" and not relative_error(results[quantity], value) <= bound:
                return f"{mode}: {quantity}"
    return None


@pytest.mark.slow
def test_every_planted_fault_is_caught():
    oracle = run_ranks(run_oracle, 1, 1, [(mode, NAMES) for mode in MODES])
    plain = run_ranks(catch, 2, 2, Topology(tp=2), oracle)
    sequence_parallel = run_ranks(catch, 2, 2, Topology(tp=2, sequence_parallel=True), oracle)
    assert plain.pop("none planted") is None
    assert sequence_parallel.pop("none planted") is None
    for name in plain:
        print(f"{name:45} {plain[name] or '-':60} {sequence_parallel[name] or '-'}")
    survived = [name for name in plain if plain[name] is None and sequence_parallel[name] is None]
    assert not survived, f"{len(survived)} of {len(plain)} planted faults went unnoticed: {survived}"
