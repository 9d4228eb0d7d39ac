"""The folder of a run: what is in it, written so that a reader never sees half a file.

config.yaml          the options of the run
report.txt           the adapted layers
metrics.jsonl        one line per step, and one per held-out loss
samples.jsonl        text generated before and after training
loss.png             both as curves
adapter.safetensors  the trained parameters
adapter.json         what they are: base, DoRA's settings, step
state.pt             what `--resume` needs
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dora_fx.cli.errors import UserError
from dora_fx.durable_files import give_default_mode, sync


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
    def adapter(self) -> Path:
        return self.path / "adapter.safetensors"

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
        write_atomically(self.path / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))

    def config_file(self) -> Path:
        """The config of a run to resume; raises UserError if this folder is none."""
        for name in ("config.yaml", "state.pt"):
            if not (self.path / name).is_file():
                raise UserError(f"--resume {self.path}: there is no {name}, expected the folder of a saved run")
        return self.path / "config.yaml"

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

    def save_state(self, state: Mapping[str, Any]) -> None:
        write_atomically(self.path / "state.pt", lambda path: torch.save(dict(state), path))

    def load_state(self) -> dict[str, Any]:
        try:
            return torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"--resume {self.path}: state.pt cannot be read ({error})") from error

    def save_adapter(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Write the adapter's tensors by their names in the Megatron model, and what they are."""
        from safetensors.torch import save_file

        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.adapter, lambda path: save_file(plain, path, metadata={"format": "pt"}))
        text = json.dumps(dict(description), indent=2) + "\n"
        write_atomically(self.path / "adapter.json", lambda path: path.write_text(text, encoding="utf-8"))

    def draw_loss_curve(self) -> None:
        from dora_fx.cli.loss_curve import draw_loss_curve

        rows = self.read_metrics()
        write_atomically(self.loss_curve, lambda path: draw_loss_curve(rows, path))


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
