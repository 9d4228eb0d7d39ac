"""`dora-fx finetune --spec`: Transformer Engine's layers, emulated kernels, go through the losses of the local ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.closeness import assert_close
from tests.distributed.test_finetune_ranks import BOUND, STEPS, assert_same_run, finetune, losses
from tests.finetune_runs import rows
from tests.hf_models import adapter_of, finetune_inputs
from tests.unit.test_specs import needs_hybrid_model as hybrid

pytestmark = pytest.mark.usefixtures("emulated_te")
slow = pytest.mark.slow
TE = ["--spec", "te"]
HYBRID = ["--spec", "hybrid"]
EAGER = ["--compile", "none"]
COMPILED = ["--compile", "layer", "--inner-compiler", "aot_eager"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # Three query groups: two ranks need a fourth, which is padding.
    options = ["--dim", 8, "--lr", 0.001, "--steps", STEPS]
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), *options, num_key_value_heads=3)


@pytest.fixture(scope="module")
def local(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("local") / "run"
    text = finetune(1, *inputs, "--compile", "none", "--spec", "local", "--run", run)
    assert "local spec" in text
    return run


@pytest.mark.parametrize(
    ("tp", "options"),
    [
        pytest.param(1, [*TE, *EAGER], id="te"),
        pytest.param(1, [*TE, *COMPILED], id="te_compiled", marks=slow),
        pytest.param(2, [*TE, *EAGER, "--sequence-parallel"], id="te_ranks", marks=slow),
        pytest.param(2, [*TE, *COMPILED], id="te_ranks_compiled", marks=slow),
    ],
)
def test_the_losses_are_those_of_the_local_spec_emulated_kernels(
    tp: int, options: list[str], inputs: list[str], local: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    text = finetune(tp, *inputs, *options, "--tp", tp, "--run", run)
    assert f"{options[1]} spec" in text
    found, expected = losses(run), losses(local)
    assert (found - expected).abs().max() <= 1e-4
    assert_same_run(run, local)


def test_stages_of_a_pipeline_train_the_local_model_emulated_kernels(
    inputs: list[str], local: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finetune(2, *inputs, *TE, *EAGER, "--pp", 2, "--run", run)
    assert_same_run(run, local)


@hybrid
def test_stages_of_a_hybrid_model_train_the_whole_emulated_kernels(inputs: list[str], tmp_path: Path) -> None:
    finetune(1, *inputs, *HYBRID, *EAGER, "--run", tmp_path / "whole")
    finetune(2, *inputs, *HYBRID, *EAGER, "--pp", 2, "--run", tmp_path / "stages")
    assert_same_run(tmp_path / "stages", tmp_path / "whole")


@hybrid
@pytest.mark.parametrize("compiled", [EAGER, pytest.param(COMPILED, marks=slow)], ids=["eager", "compiled"])
def test_a_hybrid_model_begins_as_the_local_spec_and_learns_emulated_kernels(
    compiled: list[str], inputs: list[str], local: Path, tmp_path: Path
) -> None:
    """Adapters begin otherwise where layers have other numbers; before they are trained there is only the base."""
    run = tmp_path / "run"
    finetune(1, *inputs, *HYBRID, *compiled, "--run", run)
    found, expected = rows(run, "held_out_loss"), rows(local, "held_out_loss")
    assert abs(found[0] - expected[0]) <= 1e-4
    assert found[STEPS] < found[0]
    assert abs(found[STEPS] - expected[STEPS]) < 0.1 * (expected[0] - expected[STEPS])
    text = finetune(1, "--resume", run, "--spec", "local", "--steps", STEPS + 1, expect=2)
    assert "which the model has not adapted" in text


def test_a_run_of_one_spec_goes_on_in_another_emulated_kernels(inputs: list[str], local: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(1, *inputs, *EAGER, *TE, "--steps", 3, "--run", run)
    finetune(1, "--resume", run, "--spec", "local", "--steps", STEPS)
    assert_close(losses(run), losses(local), BOUND)
    assert_close(adapter_of(run), adapter_of(local), BOUND)
