"""The folder of a run. Files are replaced atomically, and rows are appended a line at a time:

config.yaml      the options of the run
report.txt       the adapted layers
metrics.jsonl    one line per step, and one per held-out loss
samples.jsonl    text generated before and after training
loss.png         the losses, and the speed below them, as curves
checkpoint/      the trained parameters and all that `--resume` needs, see `dora_fx.save_checkpoint`
best/step_N/     the adapters of the lowest held-out losses, as a checkpoint each
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dora_fx.app.errors import UserError
from dora_fx.app.runs.options_file import read_options_file
from dora_fx.checkpoint import MANIFEST, CheckpointError, open_checkpoint, previous_of
from dora_fx.files import UnsafeFileError, give_default_mode, open_regular, parse_json, sync

# Folders in which a run writes and removes files, so they must not be links. Files are replaced as a whole, links too.
_WRITTEN_FOLDERS = ("checkpoint", previous_of(Path("checkpoint")).name, "best", "tensorboard", "wandb")

# The values that are read back.
_NUMBERS = ("loss", "held_out_loss", "held_out_certain", "tokens", "seconds")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, and rename it to `path`."""
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
    def best(self) -> Path:
        return self.path / "best"

    def best_of(self, step: int) -> Path:
        """Return the path of the checkpoint that is kept for the measurement after a step."""
        return self.best / f"step_{step}"

    def make_best(self) -> None:
        """Make the folder of kept checkpoints; raise UserError if that fails, or if it is a link."""
        _check_no_link(self.best)
        with _naming(str(self.best)):
            self.best.mkdir(exist_ok=True)

    def drop_best_but(self, steps: Container[int]) -> None:
        """Remove the kept checkpoints of all other steps; anything else in the folder stays.

        Raises:
            UserError: a removal fails, or the folder or a checkpoint in it is a link, which could lead out of the run.
        """
        for kept in self._kept():
            number = kept.name.removeprefix("step_")
            if number.isdecimal() and int(number) not in steps and (kept / MANIFEST).is_file():
                with _naming(str(kept)):
                    shutil.rmtree(kept)

    def _kept(self) -> list[Path]:
        _check_no_link(self.best)
        with _naming(str(self.best)):
            paths = sorted(self.best.glob("step_*"))
        for path in paths:
            _check_no_link(path)
        return paths

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def check_new(self) -> None:
        """Raise UserError if anything exists at the folder's path."""
        with _naming(f"--run {self.path}"):
            exists = os.path.lexists(self.path)
        if exists:
            raise UserError(f"--run {self.path}: it exists; choose another name, or go on with --resume {self.path}")

    def create(self, config: Mapping[str, Any], report: str) -> None:
        """Make the folder with its config and report; raise UserError if that fails."""
        with _naming(f"--run {self.path}"):
            self.path.mkdir(parents=True)
        self.write_config(config)
        self._write("report.txt", lambda path: path.write_text(report + "\n", encoding="utf-8"))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the options. Like every method that writes, it raises UserError if the write fails."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._write(self.config_file.name, lambda path: path.write_text(text, encoding="utf-8"))

    def saved_config(self) -> dict[str, Any]:
        """Read the options of a run to resume; raise UserError if that fails or it is no folder of a saved run."""
        if not self.config_file.is_file():
            raise UserError(f"--resume {self.path}: there is no config.yaml, expected the folder of a saved run")
        options = read_options_file(self.config_file, "--resume")
        try:
            for name in _WRITTEN_FOLDERS:
                _check_no_link(self.path / name)
            self._kept()
        except UserError as error:
            raise UserError(f"--resume {error}") from error
        try:
            open_checkpoint(checkpoint_in(self.path))
        except (CheckpointError, UserError, UnsafeFileError, OSError) as error:
            raise UserError(f"--resume {error}") from error
        return options

    def check_rows(self) -> None:
        """Raise UserError if a line of the metrics or samples is damaged, before a resumed run reads it at its end."""
        self.read_metrics()
        self.read_samples()

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Complete rows in order; a process that was killed may have left half a row.

        Raises:
            UserError: the file cannot be read, or a line is none that `append_metrics` wrote.
        """
        return _complete_rows(self.path / "metrics.jsonl", {name: (int, float) for name in _NUMBERS})

    def count_skipped(self) -> int:
        """Count the steps that made no update; raise UserError as `read_metrics` does."""
        return sum("skipped" in row for row in self.read_metrics())

    def drop_rows_after(self, step: int) -> None:
        """Remove the rows and kept checkpoints of later steps, which will be taken again, and incomplete rows."""
        self._write_rows("metrics.jsonl", [row for row in self.read_metrics() if row["step"] <= step])
        self._write_rows("samples.jsonl", [row for row in self.read_samples().values() if row["step"] <= step])
        self.drop_best_but(range(step + 1))

    def append_sample(self, step: int, prompt: str, text: str) -> None:
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "text": text})

    def read_samples(self) -> dict[int, dict[str, Any]]:
        """Read the samples by step; raise UserError as `read_metrics` does."""
        rows = _complete_rows(self.path / "samples.jsonl", {"prompt": (str,), "text": (str,)}, all_there=True)
        return {row["step"]: row for row in rows}

    def draw_loss_curve(self, title: str) -> None:
        from dora_fx.app.runs.loss_curve import draw_loss_curve

        rows = self.read_metrics()
        self._write(self.loss_curve.name, lambda path: draw_loss_curve(rows, title, path))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with _naming(str(self.path / name)), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def _write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self._write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        with _naming(str(self.path / name)):
            write_atomically(self.path / name, write)


def run_of(path: Path) -> RunFolder:
    """Return the run folder at a path, or the run folder whose `best` holds the checkpoint at the path."""
    is_kept = path.absolute().parent.name == "best" and not RunFolder(path).config_file.is_file()
    return RunFolder(path.absolute().parents[1] if is_kept else path)


def checkpoint_in(path: Path) -> Path:
    """Return the checkpoint in a run folder, or the path itself if it is not a run folder.

    Raises:
        UserError: a run folder without a checkpoint.
    """
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        return path
    if os.path.lexists(folder.checkpoint) or previous_of(folder.checkpoint).exists():
        return folder.checkpoint
    raise UserError(
        f"{path}: there is no checkpoint, the run was stopped before it saved one or is not finished; wait for its "
        "end, start it anew, or let it save earlier with --save-every N"
    )


def _check_no_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path}: found a symbolic link to {os.readlink(path)}, expected a folder of the run, in which files are "
            "written and removed; if you trust it, replace the link by a copy of its target"
        )


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Convert OSError in the block to a UserError that names the file; many errors of a full disk do not name it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error


def _complete_rows(
    path: Path, kinds: Mapping[str, tuple[type, ...]], *, all_there: bool = False
) -> list[dict[str, Any]]:
    """Read the rows of a file, each with its step; return none if there is no file.

    Args:
        path: of the file.
        kinds: types of the values by their names.
        all_there: whether every row must have all of the values, and not only some.
    """
    with _naming(str(path)):
        if not path.exists():
            return []
        try:
            with open_regular(path, follow_link=True) as file:
                # What follows the last line break is a row that a crash cut off.
                lines = file.read().split(b"\n")[:-1]
        except UnsafeFileError as error:
            raise UserError(f"{error}; remove it, as training does not need it") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, str(path))
            values = {name: row[name] for name in ("step", *kinds) if all_there or name in row or name == "step"}
            is_whole = all(isinstance(value, kinds.get(name, (int,))) for name, value in values.items())
        except (ValueError, TypeError, KeyError):
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{path}, line {number}: the line is damaged, expected an object with {', '.join(('step', *kinds))}; "
                "remove the line or the file, as training does not need it"
            )
        rows.append(row)
    return rows
