"""`dora-fx finetune` where losses or gradients are not finite: no update, the layer's name, the state before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.finetune_runs import finetune, rows, step_of
from tests.hf_models import SHAPE, adapter_of, finetune_inputs
from tests.planted_nan import Where, planted_nan

FFN = SHAPE["intermediate_size"]
LAYER = "decoder.layers.1.mlp.linear_fc2"
GRADIENT = f"the gradient of {LAYER}.adapter.weight_magnitude is the first of the backward pass that is not finite"
OUTPUT = "the loss is nan: the output of decoder.layers.0.mlp.linear_fc2 is the first"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    options = ["--lr", 0.01, "--compile", "none", "--dropout", 0.1, "--sample-tokens", 0]
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), *options)


def assert_same_adapter(found: Path, expected: Path) -> None:
    torch.testing.assert_close(adapter_of(found), adapter_of(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("where", "message", "options"),
    [
        pytest.param("gradient", GRADIENT, [], id="gradient"),
        pytest.param("output", OUTPUT, ["--save-every", 1], id="output-saved_each_step"),
        pytest.param("gradient", GRADIENT, ["--dtype", "bf16"], id="gradient-bf16"),
        pytest.param("output", OUTPUT, [], id="output", marks=pytest.mark.slow),
        pytest.param("gradient", GRADIENT, ["--save-every", 1], id="gradient-saved_each_step", marks=pytest.mark.slow),
    ],
)
def test_a_run_stops_after_three_steps_and_keeps_the_state_before_them(
    where: Where,
    message: str,
    options: list[object],
    inputs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, good = tmp_path / "run", tmp_path / "good"
    assert finetune(*inputs, *options, "--run", good, "--steps", 2) == 0
    with planted_nan(where, lambda call: call > 2, FFN):
        assert finetune(*inputs, *options, "--run", run, "--steps", 20, "--eval-every", 0) == 2
    shown = capsys.readouterr()
    for step in (3, 4, 5):
        assert f"warning: step {step} made no update: {message}" in shown.out
    assert f"the 3 steps up to step 5 made no update, at the last of them because {message}" in shown.err
    assert f"the state after step 2 is saved in {run}" in shown.err
    assert step_of(run) == 2
    assert rows(run, "skipped") == {3: 1, 4: 1, 5: 1}
    assert_same_adapter(run, good)
    # Once the fault is gone, the steps are taken as if it had never been there.
    whole = tmp_path / "whole"
    assert finetune("--resume", run, "--steps", 4) == 0
    assert finetune(*inputs, *options, "--run", whole, "--steps", 4) == 0
    assert rows(run) == rows(whole)
    assert_same_adapter(run, whole)


def test_a_single_step_is_skipped_and_a_resumed_run_skips_it_too(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts, good = tmp_path / "whole", tmp_path / "parts", tmp_path / "good"
    schedule = ["--schedule", "constant", "--warmup-steps", 3]
    with planted_nan("gradient", lambda call: call == 2, FFN):
        assert finetune(*inputs, *schedule, "--run", whole, "--steps", 4) == 0
    assert "warning: 1 of 4 steps made no update" in capsys.readouterr().out
    with planted_nan("gradient", lambda call: call == 2, FFN):
        assert finetune(*inputs, *schedule, "--run", parts, "--steps", 2) == 0
    assert finetune(*inputs, *schedule, "--run", good, "--steps", 1) == 0
    assert_same_adapter(parts, good)
    assert finetune("--resume", parts, "--steps", 4) == 0
    for key in ("loss", "lr"):
        assert rows(parts, key) == rows(whole, key)
    assert_same_adapter(parts, whole)


@pytest.mark.parametrize("steps", [1, 20])
def test_a_run_that_trains_nothing_fails_and_saves_nothing(
    steps: int, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with planted_nan("gradient", lambda _: True, FFN):
        assert finetune(*inputs, "--run", tmp_path / "run", "--steps", steps) == 2
    assert "nothing was trained" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of step 1 and 2; a run that would take NaN for the lowest would keep it for ever."""
    run = tmp_path / "run"
    batches_of_a_measurement = measured_batches(inputs, tmp_path / "counted")
    is_planted: Callable[[int], bool] = lambda call: 1 <= (call - 2) // batches_of_a_measurement <= 2  # noqa: E731
    with planted_nan("held-out output", is_planted, FFN):
        assert finetune(*inputs, "--run", run, "--steps", 4, "--eval-every", 1, "--patience", 3) == 0
    losses = rows(run, "held_out_loss")
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [1, 2]
    best = min((step for step in (3, 4)), key=lambda step: losses[step])
    assert [path.name for path in (run / "best").iterdir()] == [f"step_{best}"]


def measured_batches(inputs: list[str], run: Path) -> int:
    """Calls of a layer for one held-out loss; one more comes before the first, for buffers."""
    calls: list[int] = []

    def count(call: int) -> bool:
        calls.append(call)
        return False

    with planted_nan("held-out output", count, FFN):
        assert finetune(*inputs, "--run", run, "--steps", 1, "--eval-every", 0) == 0
    return (max(calls) - 1) // 2
