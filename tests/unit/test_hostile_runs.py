"""A run of `dora-fx finetune`, and a checkpoint of Megatron-Bridge, that somebody planted files in are refused."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

import dora_fx
from dora_fx.app.cli.main import main
from dora_fx.app.errors import UserError
from dora_fx.app.runs.run_folder import RunFolder
from dora_fx.megatron.world import megatron_world
from tests.distributed.bridge import adapter_shards, model_to_load_into, saving_on_cpu
from tests.hf_models import finetune_inputs
from tests.tables import every_case
from tests.unit.hostile_files import (
    COMMON,
    METADATA,
    Payload,
    edit_manifest,
    is_endless,
    metadata_of,
    ran,
    recompute_checksums,
    saved,
    write_metadata,
)


@pytest.fixture(scope="module", name="finished")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    inputs = finetune_inputs(folder, "--compile", "none", "--steps", 1, "--dim", 2, "--sample-tokens", 0)
    assert main(["finetune", *inputs, "--run", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def commands(run: Path) -> dict[str, list[str]]:
    to = ["--to", str(run.parent / "to")]
    return {
        "inspect": ["inspect", str(run)],
        "export": ["export", str(run), *to],
        "merge": ["merge", str(run), *to],
        "resume": ["finetune", "--resume", str(run), "--steps", "2"],
    }


def refused(run: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(commands(run)[name]) == (1 if name == "inspect" else 2)
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1
    assert not (run.parent / "to").exists()


@every_case("name", ["inspect", "export", "merge", "resume"])
def test_code_in_the_metadata(run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, marker = run / "checkpoint", tmp_path / "marker"
    metadata = metadata_of(checkpoint)
    metadata.storage_meta = Payload(marker)
    write_metadata(checkpoint, metadata)
    recompute_checksums(checkpoint)
    assert ran(marker, FileSystemReader(checkpoint).read_metadata)
    refused(run, name, f"{checkpoint / METADATA}: found 'posix.mkdir' in it", capsys)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["inspect", "resume"])
def test_code_in_the_common_file(run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exporting and merging do not open it."""
    path, marker = run / "checkpoint" / COMMON, tmp_path / "marker"
    common = torch.load(path, weights_only=True)
    path.write_bytes(saved(common | {"extra": common["extra"] | {"step": Payload(marker)}}))
    recompute_checksums(run / "checkpoint")
    assert ran(marker, lambda: torch.load(path, weights_only=False))
    refused(run, name, f"{path}: found posix.mkdir in it", capsys)
    assert not marker.exists()


@every_case("name", ["inspect", "export", "merge", "resume"])
def test_a_file_without_an_end(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    described = {"size": 0, "sha256": "0" * 64}
    edit_manifest(run / "checkpoint", lambda content: content["files"].update({"/dev/zero": described}))
    capsys.readouterr()
    assert main(commands(run)[name]) == 2
    assert "found '/dev/zero' as the name of a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["export", "merge", "resume"])
def test_an_endless_config(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of ten lines names the one before it ten times."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * 10) + "]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (run / "config.yaml").write_text("\n".join([*lines, "base: *a9", ""]))
    assert is_endless("import sys\nimport yaml\npass\nstr(yaml.safe_load(open(sys.argv[1])))", run / "config.yaml")
    refused(run, name, "found a value given by an alias, expected plain values", capsys)


@pytest.mark.parametrize("name", ["export", "resume"])
def test_code_in_a_config(run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    path = run / "config.yaml"
    path.write_text(path.read_text() + f"prompt: !!python/object/apply:os.mkdir [{marker}]\n")
    assert ran(marker, lambda: yaml.unsafe_load(path.read_text()))
    refused(run, name, "could not determine a constructor", capsys)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_pipe_in_the_place_of_rows(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert is_endless("import sys\npass\nopen(sys.argv[1], 'rb').read()", run / name, patience=3)
    refused(run, "resume", f"{run / name}: found a named pipe, expected a regular file; remove it", capsys)


@every_case("name", ["best", "checkpoint", ".checkpoint.previous", "best/step_3", "tensorboard", "wandb"])
def test_a_link_in_the_place_of_a_folder(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run writes into its folders, and removes the checkpoints of steps that it will take again."""
    outside = shutil.copytree(run / "checkpoint", run.parent / "outside" / "step_900")
    if name == "best":
        (run / "best").mkdir(exist_ok=True)
        (run / "best").rename(run.parent / "kept")
    else:
        shutil.rmtree(run / name, ignore_errors=True)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside.parent if name == "best" else outside)
    if name == "best":
        copied = shutil.copytree(outside, outside.with_name("step_901"))
        shutil.rmtree(run / "best" / "step_901")
        assert not copied.exists()
    before = (run / "metrics.jsonl").read_bytes()
    refused(run, "resume", f"--resume {run / name}: found a symbolic link to {run.parent / 'outside'}", capsys)
    assert (outside / "dora_fx.json").exists() and (run / "metrics.jsonl").read_bytes() == before


def test_only_checkpoints_are_removed(run: Path) -> None:
    best = RunFolder(run).best
    best.mkdir(exist_ok=True)
    for step in (7, 8):
        shutil.copytree(run / "checkpoint", best / f"step_{step}")
    (best / "step_9").mkdir()
    (best / "step_9" / "notes.txt").write_text("mine")
    RunFolder(run).drop_best_but([8])
    assert {path.name for path in best.glob("step_[789]")} == {"step_8", "step_9"}
    (best / "step_8").rename(run / "elsewhere")
    (best / "step_8").symlink_to(run / "elsewhere")
    with pytest.raises(UserError, match="step_8: found a symbolic link"):
        RunFolder(run).drop_best_but([])
    assert (run / "elsewhere" / "dora_fx.json").exists()


def test_rows_that_are_a_link(run: Path) -> None:
    """What it leads to is not written to: the file is replaced before the first row."""
    outside = run.parent / "outside"
    (run / "metrics.jsonl").rename(outside)
    (run / "metrics.jsonl").symlink_to(outside)
    before = outside.read_bytes()
    RunFolder(run).drop_rows_after(1)
    RunFolder(run).append_metrics({"step": 2, "loss": 1.0})
    assert outside.read_bytes() == before and not (run / "metrics.jsonl").is_symlink()


def save_bridge(folder: Path) -> Path:
    """Save as Megatron-Bridge does on one rank: Megatron's own format, and no manifest."""
    path = folder / "iter_0000001"
    path.mkdir()
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(model_to_load_into()), str(path))
    return path


def plant_in_metadata(path: Path, marker: Path) -> None:
    metadata = metadata_of(path)
    metadata.planner_data = Payload(marker)
    write_metadata(path, metadata)


def plant_in_common(path: Path, marker: Path) -> None:
    (path / COMMON).write_bytes(pickle.dumps(Payload(marker)))


def load_bridge(path: Path) -> nn.Module:
    return dora_fx.load_bridge_checkpoint(model_to_load_into(), path, tensor_parallel_size=1)


def load_with_megatron(path: Path) -> object:
    return dist_checkpointing.load(adapter_shards(model_to_load_into()), str(path))


@pytest.mark.parametrize("plant", [plant_in_metadata, plant_in_common])
def test_code_in_a_checkpoint_of_bridge(
    plant: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    with megatron_world():
        path = save_bridge(tmp_path)
        expected = dict(load_bridge(path).named_parameters())
        plant(path, marker)
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        assert ran(marker, lambda: load_with_megatron(path))
        if plant is plant_in_metadata:
            with pytest.raises(ValueError, match=r"\.metadata: found 'posix\.mkdir' in it"):
                load_bridge(path)
        else:
            # Megatron's file for what is not sharded; nothing of it is needed, so it is never opened.
            torch.testing.assert_close(dict(load_bridge(path).named_parameters()), expected, rtol=0, atol=0)
    assert not marker.exists()


def test_pieces_and_pipes_in_a_checkpoint_of_bridge(tmp_path: Path) -> None:
    with megatron_world():
        path = save_bridge(tmp_path)
        metadata = metadata_of(path)
        for piece in metadata.storage_data.values():
            piece.relative_path = f"../{path.name}/{piece.relative_path}"
        shutil.copytree(path, tmp_path / "outside")
        write_metadata(tmp_path / "outside", metadata)
        load_with_megatron(tmp_path / "outside")
        with pytest.raises(ValueError, match="as the name of a file, expected one of this folder"):
            load_bridge(tmp_path / "outside")
        (path / METADATA).unlink()
        os.mkfifo(path / METADATA)
        with pytest.raises(ValueError, match=r"\.metadata: found a named pipe, expected a regular file"):
            load_bridge(path)
