"""`dora-fx finetune` stopped, killed, and gone on with."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.finetune_runs import finetune, rows, step_of
from tests.hf_models import adapter_of, finetune_inputs, save_tiny_checkpoint
from tests.processes import start_process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that every run here has: a tiny base, a text, short sequences."""
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), "--lr", 0.01, "--compile", "none")


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

    sys.addaudithook(hook)
    sys.exit(finetune(*arguments, "--run", run))


def test_a_run_that_is_killed_in_a_save_resumes_from_the_one_before(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rename puts the first checkpoint in place, two replace it: the old one leaves, the new one comes."""
    whole = tmp_path / "whole"
    options = [*inputs, "--steps", "4", "--save-every", "1", "--dropout", "0.1"]
    assert finetune(*options, "--run", whole) == 0
    for number, saved in ((1, None), (2, 1), (3, 1), (6, 3)):
        run = tmp_path / f"killed at rename {number}"
        child = start_process(finetune_and_die, number, run, options)
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
    assert finetune("--resume", run, "--steps", 1) == 2
    assert f"--steps: found 1, but the run in {run} was saved at step 2; expected more" in capsys.readouterr().err
    assert list(rows(run)) == [1, 2]
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
    assert "the text is not the one that the run was started with" in capsys.readouterr().err
    assert finetune("--resume", run, "--dim", 3, "--steps", 2) == 2
    assert "--dim: found 3, but the run to resume was started with 16" in capsys.readouterr().err


def test_an_option_that_the_config_of_an_older_version_lacks_has_its_default(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--run", run, "--steps", 1) == 0
    config, lacking = run / "config.yaml", {"use_rslora", "rank_pattern", "weight_decay", "eval_every"}
    kept = [line for line in config.read_text().splitlines(True) if line.partition(":")[0] not in lacking]
    config.write_text("".join(kept))
    for option, found, default in (
        (["--use-rslora"], True, False),
        (["--rank-pattern", "{linear_qkv: 8}"], {"linear_qkv": 8}, {}),
        (["--weight-decay", 0.5], 0.5, 0.0),
    ):
        capsys.readouterr()
        assert finetune("--resume", run, "--steps", 2, *option) == 2
        expected = f"{option[0]}: found {found!r}, but the run to resume was started with {default!r}, the default"
        assert expected in capsys.readouterr().err
    assert finetune("--resume", run, "--steps", 2, "--eval-every", 1, "--weight-decay", 0) == 0


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
    (run / "config.yaml").unlink()
    refuse(f"--resume {run}: there is no config.yaml, expected the folder of a saved run")


def test_a_signal_while_the_last_text_is_sampled_stops_the_sample(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tokens, passes = tmp_path / "run", 8, 0

    def interrupt(module: Any, arguments: tuple[Any, ...], _: object) -> None:
        nonlocal passes
        # Samples are single sequences, all others come in batches of two.
        if isinstance(module, GPTModel) and len(arguments[0]) == 1:
            passes += 1
            if passes == tokens + 3:
                os.kill(os.getpid(), signal.SIGINT)

    handle = register_module_forward_hook(interrupt)
    try:
        assert finetune(*inputs, "--run", run, "--steps", 2, "--sample-tokens", tokens) == 130
    finally:
        handle.remove()
    shown = capsys.readouterr().out
    assert passes == tokens + 3 and len((run / "samples.jsonl").read_text().splitlines()) == 1
    assert "stopped by SIGINT at step 2 of 2; saved" in shown
    assert f"run folder: {run}" in shown and "go on with" not in shown
    assert step_of(run) == 2 and list(rows(run, "held_out_loss")) == [0, 1, 2]


def test_a_run_that_is_stopped_in_the_middle_of_an_update_is_not_saved_there(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = [*inputs, "--steps", 4, "--save-every", 2]
    assert finetune(*options, "--run", whole) == 0
    capsys.readouterr()

    def ask_twice(*_: object) -> None:
        if (run / "metrics.jsonl").exists() and 3 in rows(run):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    # Moments and parameters are new then; the step does not count yet.
    handle = register_optimizer_step_post_hook(ask_twice)
    try:
        assert finetune(*options, "--run", run) == 130
    finally:
        handle.remove()
    assert "saved" not in capsys.readouterr().out
    assert (max(rows(run)), step_of(run)) == (3, 2)
    assert finetune("--resume", run) == 0
    assert rows(run) == rows(whole)
    torch.testing.assert_close(adapter_of(run), adapter_of(whole), rtol=0, atol=0)
