"""`--log`: TensorBoard's files, a run of W&B, and the line where one of them cannot be written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.finetune_runs import finetune, rows
from tests.hf_models import finetune_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), "--compile", "none", "--sample-tokens", 0, "--steps", 2)


def test_tensorboard_has_what_the_metrics_have(inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--log", "tensorboard", "--run", run) == 0
    assert finetune("--resume", run, "--steps", 3) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "grad_norm", "tokens_per_second", "held_out_loss"}
    for name in ("loss", "held_out_loss", "grad_norm"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(rows(run, name), rel=1e-6), name


def test_wandb_writes_its_files_beside_the_run_s(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert finetune(*inputs, "--log", "wandb", "--run", tmp_path / "run") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_without_a_login_is_one_line_before_training(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It remembers the mode of an earlier run in the process.
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert finetune(*inputs, "--log", "wandb", "--run", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "--log wandb: nobody is logged in; log in with: wandb login" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_that_is_not_installed_is_named(
    name: str, inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert finetune(*inputs, "--log", name) == 2
    assert f"--log {name}: it cannot be imported" in capsys.readouterr().err


def test_an_unknown_log_is_named(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(*inputs, "--log", "mlflow") == 2
    assert "--log: found 'mlflow', expected some of tensorboard, wandb" in capsys.readouterr().err
