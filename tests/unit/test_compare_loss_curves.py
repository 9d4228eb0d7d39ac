"""The comparison of loss curves tells runs apart that differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_loss_curves.py"


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_largest_distance_over_shared_steps(tmp_path):
    runs = [write_run(tmp_path / "a", [3.0, 2.0]), write_run(tmp_path / "b", [3.0, 2.25, 1.0])]
    picture = tmp_path / "curves.png"
    command = [sys.executable, SCRIPT, *runs, "--png", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "b: 2 steps, at most 2.5e-01 from a" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
