"""The folder of a run: what is in it, written so that a reader never sees half a file.

config.yaml      the options of the run
report.txt       the adapted layers
metrics.jsonl    one line per step, and one per held-out loss
samples.jsonl    text generated before and after training
loss.png         both as curves
checkpoint/      the trained parameters and all that `--resume` needs, see `dora_fx.save_checkpoint`
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dora_fx.checkpoint import CheckpointError
from dora_fx.checkpoint.directory import open_checkpoint, previous_of
from dora_fx.cli.errors import UserError
from dora_fx.durable_files import give_default_mode, sync
from dora_fx.safe_files.regular_file import UnsafeFileError
from dora_fx.safe_files.yaml_file import check_yaml


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file next to `path`, then put it in its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        sync(temporary)
        give_default_mode(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes the files of one run."""

    path: Path

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def check_new(self) -> None:
        """Raise UserError if the folder, or anything else of its name, exists."""
        if self.path.exists():
            raise UserError(f"--run {self.path}: it exists; choose another name, or go on with --resume {self.path}")

    def create(self, config: Mapping[str, Any], report: str) -> None:
        """Make the folder with its config and report; raises UserError if that cannot be done."""
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--run {self.path}: {error.strerror}") from error
        self.write_config(config)
        write_atomically(self.path / "report.txt", lambda path: path.write_text(report + "\n", encoding="utf-8"))

    def write_config(self, config: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_file, lambda path: path.write_text(text, encoding="utf-8"))

    def resumable_config(self) -> Path:
        """The config of a run to resume; raises UserError if this folder is none."""
        if not self.config_file.is_file():
            raise UserError(f"--resume {self.path}: there is no config.yaml, expected the folder of a saved run")
        try:
            check_yaml(self.config_file)
            open_checkpoint(checkpoint_in(self.path))
        except (CheckpointError, UserError, UnsafeFileError, OSError) as error:
            raise UserError(f"--resume {error}") from error
        return self.config_file

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Complete rows in order; a process that was killed may have left half a row."""
        return _complete_rows(self.path / "metrics.jsonl")

    def drop_metrics_after(self, step: int) -> None:
        """Forget rows of steps that the saved state does not have; they will be taken again."""
        text = "".join(json.dumps(row) + "\n" for row in self.read_metrics() if row["step"] <= step)
        write_atomically(self.path / "metrics.jsonl", lambda path: path.write_text(text, encoding="utf-8"))

    def append_sample(self, step: int, prompt: str, text: str) -> None:
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")

    def read_samples(self) -> dict[int, dict[str, Any]]:
        """Samples by the step they were taken at."""
        return {row["step"]: row for row in _complete_rows(self.path / "samples.jsonl")}

    def draw_loss_curve(self) -> None:
        from dora_fx.cli.loss_curve import draw_loss_curve

        rows = self.read_metrics()
        write_atomically(self.loss_curve, lambda path: draw_loss_curve(rows, path))


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that a path means: a run folder's own, or the path itself.

    Raises:
        UserError: a run folder without a checkpoint.
    """
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        return path
    if os.path.lexists(folder.checkpoint) or previous_of(folder.checkpoint).exists():
        return folder.checkpoint
    if (path / "state.pt").exists():
        raise UserError(
            f"{path}: found state.pt and no checkpoint, the folder of a run that an earlier version of dora_fx saved; "
            "go on with that version, or start a new run"
        )
    raise UserError(f"{path}: there is no checkpoint, the run was stopped before it saved one; start it anew")


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
