"""`dora-fx finetune` from its command line to its run folder, on a tiny model."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dora_fx.checkpoint.plain import read_adapters
from dora_fx.cli.main import main
from tests.hf_models import adapter_of, finetune_inputs, save_tiny_checkpoint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that every run here has: a tiny base, a text, short sequences."""
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), "--lr", 0.01, "--compile", "none")


def finetune(*arguments: object) -> int:
    """Run the command in this process, with nothing compiled left of an earlier run."""
    torch._dynamo.reset()
    return main(["finetune", *map(str, arguments)])


def rows(run: Path, key: str = "loss") -> dict[int, float]:
    """Steps and values of one kind of row of metrics.jsonl, each step at most once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def step_of(run: Path) -> int:
    """The step that a run would go on after."""
    return torch.load(run / "checkpoint" / "common.pt", weights_only=True)["extra"]["step"]


def stop_after(run: Path, step: int, signal_number: int) -> threading.Thread:
    """Send this process a signal once the metrics of `step` are written."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and step in rows(run):
                os.kill(os.getpid(), signal_number)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_run_writes_its_folder_and_learns(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--compile", "layer", "--inner-compiler", "eager", "--gradient-accumulation", 2, "--eval-every", 10]
    assert finetune(*inputs, *options, "--run", run, "--steps", 30) == 0
    assert sorted(path.name for path in run.iterdir()) == [
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
        pytest.param(["--compile", "layer", "--inner-compiler", "aot_eager"], id="compiled"),
        pytest.param(["--dropout", 0.2, "--gradient-accumulation", 2], id="dropout"),
        pytest.param(["--dtype", "bf16", "--schedule", "cosine", "--warmup-steps", 2], id="bf16"),
    ],
)
def test_a_resumed_run_goes_through_the_losses_of_an_uninterrupted_one(
    options: list[Any], inputs: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Eight sequences a step of some fifty: the interrupted run crosses epochs on both sides of the stop.
    options = [*options, "--batch-size", 8, "--steps", 14]
    assert finetune(*inputs, *options, "--run", whole) == 0
    stop_after(parts, 5, signal.SIGINT)
    assert finetune(*inputs, *options, "--run", parts) == 130
    stopped_at = max(rows(parts))
    assert 5 <= stopped_at < 14
    assert finetune("--resume", parts) == 0
    assert rows(parts) == rows(whole)
    assert rows(parts, "held_out_loss") == rows(whole, "held_out_loss")
    assert rows(parts, "grad_norm") == rows(whole, "grad_norm")
    torch.testing.assert_close(adapter_of(parts), adapter_of(whole), rtol=0, atol=0)


def test_sigterm_saves_and_says_how_to_go_on(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stop_after(run, 2, signal.SIGTERM)
    assert finetune(*inputs, "--run", run, "--steps", 500) == 143
    shown = capsys.readouterr().out
    step = max(rows(run))
    assert f"stopped by SIGTERM at step {step} of 500; saved" in shown
    assert f"go on with: dora-fx finetune --resume {run}" in shown
    assert step_of(run) == step
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_rows_that_a_killed_run_wrote_after_its_last_save_are_taken_again(inputs: list[str], tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert finetune(*inputs, "--run", whole, "--steps", 5) == 0
    assert finetune(*inputs, "--run", run, "--steps", 3) == 0
    # What a kill leaves behind: steps after the save, and half a line.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    assert finetune("--resume", run, "--steps", 5) == 0
    assert rows(run) == rows(whole)


def finetune_and_die(number: int, run: Path, arguments: list[str]) -> None:
    """Run the command; kill this process before the `number`-th time that it renames a checkpoint."""
    seen = 0

    def hook(event: str, names: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and run / "checkpoint" in map(Path, map(os.fspath, names[:2])):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    sys.exit(finetune(*arguments, "--run", run))


def test_a_run_that_is_killed_in_a_save_resumes_from_the_one_before(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rename puts the first checkpoint in place, two replace it: the old one leaves, the new one comes."""
    whole = tmp_path / "whole"
    options = [*inputs, "--steps", "4", "--save-every", "1", "--dropout", "0.1"]
    assert finetune(*options, "--run", whole) == 0
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["tests.unit.test_finetune"])
    for number, saved in ((1, None), (2, 1), (3, 1), (6, 3)):
        run = tmp_path / f"killed at rename {number}"
        child = children.Process(target=finetune_and_die, args=(number, run, options))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        capsys.readouterr()
        if saved is None:
            assert finetune("--resume", run) == 2
            assert "there is no checkpoint, the run was stopped before it saved one" in capsys.readouterr().err
            continue
        assert max(rows(run)) == saved + 1
        assert finetune("--resume", run) == 0
        assert f"resumed at step {saved} of 4" in capsys.readouterr().out
        assert rows(run) == rows(whole)
        torch.testing.assert_close(adapter_of(run), adapter_of(whole), rtol=0, atol=0)
        assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_finished_run_can_be_trained_further_only_with_more_steps(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--run", run, "--steps", 2) == 0
    capsys.readouterr()
    assert finetune("--resume", run) == 2
    assert f"--resume {run}: all of its 2 steps are done; more with --steps" in capsys.readouterr().err
    assert finetune("--resume", run, "--steps", 3) == 0
    assert list(rows(run)) == [1, 2, 3]


def test_a_run_whose_text_changed_is_not_resumed(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    original = Path(inputs[inputs.index("--data") + 1]).read_text()
    text.write_text(original)
    assert finetune(*inputs, "--data", text, "--run", run, "--steps", 1) == 0
    text.write_text(original + "More of it.")
    assert finetune("--resume", run, "--steps", 2) == 2
    assert "the text is not the one the run was started with" in capsys.readouterr().err
    assert finetune("--resume", run, "--dim", 3, "--steps", 2) == 2
    assert "--dim: found 3, but the run to resume was started with 16" in capsys.readouterr().err


def test_what_cannot_be_resumed_is_named(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = tmp_path / "run", Path(inputs[inputs.index("--base") + 1])
    shutil.copytree(base, tmp_path / "base")
    assert finetune(*inputs, "--base", tmp_path / "base", "--run", run, "--steps", 1) == 0

    def refuse(message: str) -> None:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert finetune("--resume", run, "--steps", 2) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    shutil.rmtree(tmp_path / "base")
    save_tiny_checkpoint(tmp_path / "base", seed=4)
    refuse(f"--resume {run}: {run / 'checkpoint'}: was trained on another base model than this one: decoder.layers.mlp")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(base, tmp_path / "base")
    data = run / "checkpoint" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refuse(f"{data}: found {len(whole) - 1} bytes, expected {len(whole)}; the file is damaged")
    data.unlink()
    refuse(f"{data}: the file is missing")
    (run / "checkpoint" / "dora_fx.json").write_text("{")
    refuse(f"--resume {run / 'checkpoint' / 'dora_fx.json'}: the file is damaged")
    shutil.rmtree(run / "checkpoint")
    refuse(f"--resume {run}: there is no checkpoint, the run was stopped before it saved one")
    (run / "state.pt").touch()
    refuse(f"--resume {run}: found state.pt and no checkpoint")
    (run / "config.yaml").unlink()
    refuse(f"--resume {run}: there is no config.yaml, expected the folder of a saved run")


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
    worst = max(abs(losses["compiled"][step] - loss) for step, loss in losses["eager"].items())
    assert worst <= 1e-4


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


def test_a_loss_that_is_not_finite_ends_the_run_without_a_save(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--lr", 1e30, "--max-grad-norm", 0, "--save-every", 1, "--steps", 20]
    assert finetune(*inputs, *options, "--run", run) == 2
    assert "a smaller --lr may help" in capsys.readouterr().err


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "dora_fx.cli.main", "finetune", "--demo", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.strip().endswith("dora-fx: error: --steps: found 0, expected a positive integer")
    assert "Traceback" not in done.stderr


def test_weight_decay_is_of_the_factors_alone(inputs: list[str], tmp_path: Path) -> None:
    """With a learning rate that moves nothing else, decay takes its share of A at every step."""
    for name, decay in (("plain", 0), ("decayed", 1e5)):
        options = ["--weight-decay", decay, "--lr", 1e-6, "--steps", 2]
        assert finetune(*inputs, *options, "--run", tmp_path / name) == 0
    plain, decayed = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "decayed")
    for key, tensor in plain.items():
        share = 0.9**2 if key.endswith("linear_in.weight") else 1.0
        torch.testing.assert_close(decayed[key], share * tensor, rtol=0, atol=1e-5, msg=key)


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
