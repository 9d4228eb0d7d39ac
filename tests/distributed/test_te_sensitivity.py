"""Faults planted in the route of Transformer Engine's layers, with emulated kernels: each is noticed."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import relative_error
from tests.distributed.launch import call_in_process, run_ranks
from tests.distributed.mutations import Mutation, planted
from tests.distributed.oracle import run_oracle
from tests.distributed.te_mutations import NORM_AFTER_THE_GATHER, ROUNDINGS, TE_MUTATIONS
from tests.distributed.test_sensitivity import catch
from tests.distributed.training import Mode
from tests.distributed.zoo import Topology
from tests.graph.te_sites import text_of
from tests.unit.test_input_norm import NORMS, expected, norm_and_input

NAMES = ("te_norm_column_rms_centered", "te_row", "te_duplicated_bias_returned", "te_chain")
MODES = [Mode(num_steps=1), Mode(compiler="dora_fx_eager", num_steps=1)]


@pytest.mark.default
@pytest.mark.usefixtures("emulated_te")
@pytest.mark.parametrize(
    "faults",
    [pytest.param(TE_MUTATIONS[:2], id="sample"), pytest.param(TE_MUTATIONS, id="all", marks=pytest.mark.slow)],
)
def test_every_planted_fault_is_caught_emulated_kernels(faults):
    answers = list(zip(MODES, run_ranks(run_oracle, 1, 1, [(mode, NAMES) for mode in MODES]), strict=True))
    faults = [mutation.name for mutation in faults]
    plain = run_ranks(catch, 2, 2, Topology(tp=2), answers, faults, NAMES)
    sequence_parallel = run_ranks(catch, 2, 2, Topology(tp=2, sequence_parallel=True), answers, faults, NAMES)
    assert plain.pop("none planted") is None
    assert sequence_parallel.pop("none planted") is None
    for name in faults:
        print(f"{name:45} {plain[name] or '-':60} {sequence_parallel[name] or '-'}")
    survived = [name for name in faults if plain[name] is None and sequence_parallel[name] is None]
    assert not survived, f"planted faults that went unnoticed: {survived}"


def text_with_the_norm_after_the_gather() -> str:
    with planted(NORM_AFTER_THE_GATHER):
        return text_of("TELayerNormColumnParallelLinear", 2, True, 0.0, False, {})


@pytest.mark.default
@pytest.mark.usefixtures("emulated_te")
def test_a_norm_after_the_gather_shows_in_the_graph_emulated_kernels():
    right = call_in_process(text_of, "TELayerNormColumnParallelLinear", 2, True, 0.0, False, {})
    wrong = call_in_process(text_with_the_norm_after_the_gather)
    assert 'rms_norm: "f32[8, 2, 48]"' in right and "gather_sequence(rms_norm" in right
    assert 'rms_norm: "f32[16, 2, 48]"' in wrong


@pytest.mark.default
@pytest.mark.parametrize("mutation", ROUNDINGS, ids=lambda mutation: mutation.name)
def test_a_rounding_too_many_shows(mutation: Mutation):
    from dora_fx.function.input_norm import normalise

    def share_of_wrong() -> float:
        wrong = []
        for name, centered in NORMS:
            torch.manual_seed(0)
            norm, x = norm_and_input(name, centered, torch.bfloat16)
            exact = expected(x.double(), norm)
            wrong.append(float((normalise(x, norm) != exact.to(x.dtype)).double().mean()))
            assert relative_error(normalise(x, norm), exact) < 0.1
        return max(wrong)

    assert share_of_wrong() < 0.01
    with planted(mutation):
        assert share_of_wrong() > 0.05
