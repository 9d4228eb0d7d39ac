"""The harness notices every fault of a list that is planted in the library's own code; by default a few are planted."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.mutations import MUTATIONS, OF_OWN_TOKENS, WRONG_GROUP, planted
from tests.distributed.oracle import run_oracle
from tests.distributed.te_mutations import NORM_AFTER_THE_GATHER, ROUNDINGS, TE_MUTATIONS
from tests.distributed.test_same_function_everywhere import bound_of, error_of
from tests.distributed.training import Mode, TrainingRun
from tests.distributed.zoo import Topology
from tests.tables import every_case

NAMES = ("column_bias_added", "row_bias_added", "gated_mlp")
# Gradients are completed in each backward pass, and once per step.
MODES = [
    Mode(num_steps=2, complete_gradients="every_backward"),
    Mode(dropout=0.3, num_steps=1),
    Mode(compiler="dora_fx_eager", num_steps=1, complete_gradients="every_backward"),
]
# In a plain run the experiments go without any fault first, and would betray each one that the slow test shows them to
# catch. A few are planted to see that the harness does catch them: in a term, a collective, a gradient and a mask.
SAMPLE = ["bias scaled", "norm's terms not reduced", "gradient of A not reduced", "two dropout masks", OF_OWN_TOKENS[0]]
# The one that is left out takes another topology.
ALL = [mutation.name for mutation in MUTATIONS if mutation is not WRONG_GROUP]
Answers = list[tuple[Mode, dict[str, torch.Tensor]]]


def catch(
    topology: Topology, answers: Answers, faults: list[str], names: tuple[str, ...] = NAMES
) -> dict[str, str | None]:
    """Mutation -> the first quantity that betrays it, None where none does. Runs on every rank alike."""
    caught = {"none planted": first_wrong(topology, answers, names)}
    for mutation in (*MUTATIONS, *TE_MUTATIONS):
        if mutation.name in faults:
            with planted(mutation):
                caught[mutation.name] = first_wrong(topology, answers, names)
    return caught


def first_wrong(topology: Topology, answers: Answers, names: tuple[str, ...]) -> str | None:
    for mode, expected in answers:
        try:
            results = TrainingRun(topology, mode, names).results()
        except (RuntimeError, ValueError) as error:
            # A ValueError is of attaching, which tries each layer.
            return f"{mode}: {type(error).__name__}"
        if float(results["replicas differ by"]) > 0.0:
            return f"{mode}: replicas differ"
        for quantity, value in expected.items():
            if quantity == "replicas differ by":
                continue
            if not error_of(results[quantity], value, mode.dtype) <= bound_of(quantity, mode.dtype):
                return f"{mode}: {quantity}"
    return None


@every_case(
    "mutation", [*MUTATIONS, *TE_MUTATIONS, *ROUNDINGS, NORM_AFTER_THE_GATHER], ids=lambda mutation: mutation.name
)
def test_the_text_of_a_fault_is_in_the_code(mutation):
    code = inspect.unwrap(mutation.function).__code__
    with planted(mutation):
        assert inspect.unwrap(mutation.function).__code__ != code
    assert inspect.unwrap(mutation.function).__code__ is code


@pytest.fixture(scope="module")
def answers() -> Answers:
    return list(zip(MODES, run_ranks(run_oracle, 1, 1, [(mode, NAMES) for mode in MODES]), strict=True))


@pytest.mark.default
@pytest.mark.parametrize(
    "faults", [pytest.param(SAMPLE, id="sample"), pytest.param(ALL, id="all", marks=pytest.mark.slow)]
)
def test_every_planted_fault_is_caught(faults, answers):
    plain = run_ranks(catch, 2, 2, Topology(tp=2), answers, faults)
    sequence_parallel = run_ranks(catch, 2, 2, Topology(tp=2, sequence_parallel=True), answers, faults)
    assert plain.pop("none planted") is None
    assert sequence_parallel.pop("none planted") is None
    assert set(plain) == set(faults)
    for name in plain:
        print(f"{name:65} {plain[name] or '-':60} {sequence_parallel[name] or '-'}")
    survived = [name for name in plain if plain[name] is None and sequence_parallel[name] is None]
    assert not survived, f"{len(survived)} of {len(plain)} planted faults went unnoticed: {survived}"
    assert all(sequence_parallel[name] is not None for name in OF_OWN_TOKENS if name in faults)


@pytest.mark.default
def test_the_wrong_group_is_caught(answers):
    # Only where both groups have two ranks do shapes not tell them apart. Data-parallel ranks draw masks of their own.
    without_dropout = [(mode, expected) for mode, expected in answers if not mode.dropout]
    caught = run_ranks(catch, 4, 2, Topology(tp=2, dp=2), without_dropout, [WRONG_GROUP.name])
    print(caught)
    assert caught.pop("none planted") is None
    assert caught[WRONG_GROUP.name] is not None
