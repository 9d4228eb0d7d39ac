"""`dora-fx finetune` from its command line to its run folder, on a tiny model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dora_fx.checkpoint import read_adapters
from tests.closeness import assert_close, rounding
from tests.distributed.mutations import MUTATIONS, planted
from tests.finetune_runs import ROUNDINGS_OF_A_STEP, finetune, rows, step_of
from tests.hf_models import adapter_of, finetune_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that every run here has: a tiny base, a text, short sequences."""
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), "--lr", 0.01, "--compile", "none")


def test_a_run_writes_its_folder_and_learns(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--compile", "layer", "--inner-compiler", "eager", "--gradient-accumulation", 2, "--eval-every", 10]
    assert finetune(*inputs, *options, "--run", run, "--steps", 30) == 0
    assert sorted(path.name for path in run.iterdir()) == [
        "best",
        "checkpoint",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "report.txt",
        "samples.jsonl",
    ]
    assert list(rows(run)) == list(range(1, 31))
    held_out = rows(run, "held_out_loss")
    assert list(held_out) == [0, 10, 20, 30]
    assert held_out[30] < held_out[0] - 1.0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "decoder.layers.1.mlp.linear_fc2" in (run / "report.txt").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 30
    shown = capsys.readouterr().out
    assert f"held-out loss: {held_out[0]:.4f} before, {held_out[30]:.4f} after" in shown
    assert "the first step compiles the model for training, once" in shown
    assert "2 x decoder.layers.*.mlp.linear_fc1  column" in shown
    assert f"run folder: {run}" in shown
    before, after = (json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines())
    assert (before["step"], after["step"]) == (0, 30) and before["prompt"] == after["prompt"]


def test_the_saved_adapter_is_the_trained_one(inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--run", run, "--steps", 2, "--target-modules", "[linear_qkv]", "--dim", 4) == 0
    adapter = adapter_of(run)
    prefix = "decoder.layers.0.self_attention.linear_qkv.adapter."
    shapes = {name.removeprefix(prefix): tuple(t.shape) for name, t in adapter.items() if name.startswith(prefix)}
    assert shapes == {"linear_in.weight": (4, 48), "linear_out.weight": (80, 4), "weight_magnitude": (80,)}
    assert len(adapter) == 6
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    assert {layer.settings.dim for layer in read_adapters(run / "checkpoint").values()} == {4}
    assert step_of(run) == 2


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--compile", "layer"], id="layer"),
        # Megatron treats a batch of one sequence in a way of its own.
        pytest.param(["--compile", "layer", "--batch-size", 1], id="layer_one_sequence", marks=pytest.mark.slow),
        pytest.param(["--compile", "model", "--batch-size", 1], id="model_one_sequence", marks=pytest.mark.slow),
        pytest.param(["--compile", "model"], id="model", marks=pytest.mark.slow),
    ],
)
def test_compiled_and_eager_training_go_through_the_same_losses(
    options: list[Any], inputs: list[str], tmp_path: Path
) -> None:
    options = [*options, "--steps", 20, "--lr", 1e-3, "--sample-tokens", 0, "--inner-compiler", "inductor"]
    assert finetune(*inputs, *options, "--run", tmp_path / "compiled") == 0
    assert finetune(*inputs, *options, "--compile", "none", "--run", tmp_path / "eager") == 0
    losses = {name: rows(tmp_path / name) for name in ("compiled", "eager")}
    assert losses["eager"][20] < losses["eager"][1]
    found, expected = (torch.tensor(list(losses[name].values())) for name in ("compiled", "eager"))
    assert_close(found, expected, rounding(torch.float32, 20 * ROUNDINGS_OF_A_STEP))


def test_bfloat16_training_follows_float32(inputs: list[str], tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        options = ["--dtype", dtype, "--steps", 30, "--lr", 1e-3]
        assert finetune(*inputs, *options, "--run", tmp_path / dtype) == 0
    held_out = {dtype: rows(tmp_path / dtype, "held_out_loss") for dtype in ("fp32", "bf16")}
    fallen = held_out["fp32"][0] - held_out["fp32"][30]
    assert fallen > 0.3
    assert math.isclose(held_out["bf16"][0] - held_out["bf16"][30], fallen, rel_tol=0.1)
    dtypes = {tensor.dtype for tensor in adapter_of(tmp_path / "bf16").values()}
    assert dtypes == {torch.bfloat16, torch.float32}


def test_a_target_that_matches_nothing_is_named(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(*inputs, "--run", tmp_path / "run", "--target-modules", "[linear_qvk]") == 2
    assert "linear_qvk" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sequence_longer_than_the_model_takes_is_refused(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(*inputs, "--run", tmp_path / "run", "--sequence-length", 129) == 2
    assert "--sequence-length: found 129, expected at most 128" in capsys.readouterr().err


def test_losses_that_are_not_finite_end_the_run_and_the_state_before_them_is_saved(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--lr", 1e30, "--max-grad-norm", 0, "--save-every", 1, "--steps", 20]
    assert finetune(*inputs, *options, "--run", run) == 2
    assert "a smaller --lr may help" in capsys.readouterr().err
    assert all(map(math.isfinite, rows(run).values()))
    assert 1 <= step_of(run) == max(rows(run)) < 20


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dora_fx.app.cli.main", "finetune", "--demo", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr == "dora-fx: error: --steps: found 0, expected a positive integer\n" and done.stdout == ""


def test_weight_decay_is_of_the_factors_alone(inputs: list[str], tmp_path: Path) -> None:
    """With a learning rate that moves nothing else, decay takes its share of A at every step."""
    for name, decay in (("plain", 0), ("decayed", 1e5)):
        options = ["--weight-decay", decay, "--lr", 1e-6, "--steps", 2]
        assert finetune(*inputs, *options, "--run", tmp_path / name) == 0
    plain, decayed = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "decayed")
    for key, tensor in plain.items():
        share = 0.9**2 if key.endswith("linear_in.weight") else 1.0
        # Adam's first updates are of the learning rate at most, up or down, in either run.
        rounded = 4 * torch.finfo(torch.float32).eps * tensor.abs().max()
        assert (decayed[key] - share * tensor).abs().max() <= 2 * 2 * 1e-6 + rounded, key


def test_a_norm_of_zero_clips_nothing_and_the_norm_is_the_one_before_clipping(
    inputs: list[str], tmp_path: Path
) -> None:
    for name in ("0", "1e9", "1e-9"):
        assert finetune(*inputs, "--max-grad-norm", name, "--steps", 2, "--run", tmp_path / name) == 0
    found = {name: adapter_of(tmp_path / name) for name in ("0", "1e9", "1e-9")}
    torch.testing.assert_close(found["0"], found["1e9"], rtol=0, atol=0)
    assert any(not torch.equal(found["1e-9"][key], tensor) for key, tensor in found["0"].items())
    norms = [rows(tmp_path / name, "grad_norm")[1] for name in found]
    assert norms[0] == norms[1] == norms[2] > 0.01


def test_a_checked_run_goes_as_one_that_is_not(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", 2, "--compile", "layer", "--inner-compiler", "eager", "--dropout", 0.2]
    for run, check in (("plain", []), ("checked", ["--check"])):
        assert finetune(*inputs, *options, *check, "--run", tmp_path / run) == 0
    output = capsys.readouterr().out
    assert re.search(r"^ok +slope +the loss changes", output, re.M)
    assert re.search(r"^ok +compiled +loss within", output, re.M)
    assert re.search(r"^nothing is wrong; loss ", output, re.M)
    for key in ("loss", "grad_norm", "held_out_loss"):
        assert rows(tmp_path / "checked", key) == rows(tmp_path / "plain", key)


def test_a_run_whose_check_fails_trains_nothing(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with planted(next(mutation for mutation in MUTATIONS if mutation.name == "norm's scaling not squared")):
        assert finetune(*inputs, "--check", "--run", run) != 0
    assert "--check: magnitudes: " in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} <= {"config.yaml", "report.txt"}
