"""`dora-fx inspect` shows what a checkpoint holds and says what is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import dora_fx
from dora_fx.app.cli.main import main
from tests.unit.checkpoints import adapted

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(1, dropout=0.1), path, extra={"step": 3})
    return path


def test_tables(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["decoder.layers.mlp.linear_fc1", "4", "8", "2", "0.1"] in rows
    assert ["decoder.layers.mlp.linear_fc1.adapter.linear_out.weight", "1x96x4", "float32", "1,536"] in rows
    assert ["decoder.layers.mlp.linear_fc2.adapter.weight_magnitude", "1x32", "float32", "128"] in rows
    assert ["__0_0.distcp", f"{(checkpoint / '__0_0.distcp').stat().st_size:,}"] in rows
    assert ["at", "layout", "tp", "1,", "pp", "1,", "vpp", "1,", "cp", "1,", "dp", "1"] in rows
    [writers] = [" ".join(row) for row in rows if row[:2] == ["written", "by"]]
    assert f"dora_fx {dora_fx.__version__}, " in writers and f"torch {torch.__version__}" in writers
    assert ["optimizer", "no"] in rows
    assert ["extra", "yes"] in rows
    assert ["all", "files", "are", "whole"] in rows


def test_damaged_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "common.pt").unlink()
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-5])
    assert main(["inspect", str(checkpoint)]) == 1
    captured = capsys.readouterr()
    assert f"{checkpoint / 'common.pt'}: the file is missing" in captured.err
    assert f"{data}: found {data.stat().st_size} bytes, expected {data.stat().st_size + 5}" in captured.err
    assert "2 of 4 files damaged" in captured.out


def test_damaged_manifest(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "dora_fx.json").write_text("{")
    assert main(["inspect", str(checkpoint)]) == 2
    assert "dora_fx.json: the file is damaged" in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "checkpoint")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_an_interrupted_save(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.rename(checkpoint.with_name(".checkpoint.previous"))
    assert main(["inspect", str(checkpoint)]) == 0
    assert "this is the checkpoint that it was replacing" in capsys.readouterr().out


def test_the_folder_of_a_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint.parent / "config.yaml").write_text("base: smollm2\n")
    assert main(["inspect", str(checkpoint)]) == 0
    expected = capsys.readouterr().out
    assert main(["inspect", str(checkpoint.parent)]) == 0
    assert capsys.readouterr().out == expected
    checkpoint.rename(checkpoint.with_name(".checkpoint.previous"))
    assert main(["inspect", str(checkpoint.parent)]) == 0
    assert capsys.readouterr().out.startswith(expected.partition("\n\nall files")[0])
    shutil.rmtree(checkpoint.with_name(".checkpoint.previous"))
    assert main(["inspect", str(checkpoint.parent)]) == 2
    assert f"{checkpoint.parent}: there is no checkpoint" in capsys.readouterr().err
