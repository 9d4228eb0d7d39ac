"""A second start finds every compiled graph in torch's caches, and never one of another source or another rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.closeness import assert_close, rounding

ROOT = Path(__file__).parents[2]


def start(name: str, tp: int, cache: Path, root: Path = ROOT) -> list[dict[str, Any]]:
    """Compile in new processes with the sources in `root`; returns the report of every rank."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "tests.distributed.compile_in_new_processes"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        commands = [[*program, str(rank), name, str(tp), str(cache), folder] for rank in range(tp)]
        settings = {"cwd": root, "env": environment, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **settings) for command in commands]
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
        return [torch.load(Path(folder) / str(rank)) for rank in range(tp)]


def assert_right(report: dict[str, Any]) -> None:
    assert_close(report["compiled"], report["eager"], rounding(torch.float32, report["roundings"]))


def hits(report: dict[str, Any]) -> tuple[int, int, int]:
    """Graphs that were compiled, graphs that AOTAutograd's cache had, and kernels that Inductor's had."""
    aot, inductor = report["aot_autograd"], report["inductor"]
    assert aot.get("autograd_cache_bypass", 0) == inductor.get("fxgraph_cache_bypass", 0) == 0
    return aot["total"], aot.get("autograd_cache_hit", 0), inductor.get("fxgraph_cache_hit", 0)


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("layers", 2),
        pytest.param("recomputed layers", 1, marks=pytest.mark.slow),
        pytest.param("gpt", 1, marks=pytest.mark.slow),
        pytest.param("gpt", 2, marks=pytest.mark.slow),
    ],
)
def test_a_second_start_compiles_nothing(name: str, tp: int, tmp_path: Path) -> None:
    first, second = start(name, tp, tmp_path), start(name, tp, tmp_path)
    for rank in range(tp):
        assert hits(first[rank]) == (1, 0, 0)
        assert hits(second[rank]) == (1, 1, 2)
        assert_right(first[rank])
        for key, value in first[rank]["compiled"].items():
            assert torch.equal(second[rank]["compiled"][key], value), key


@pytest.mark.slow
def test_a_changed_source_does_not_meet_what_another_compiled(tmp_path: Path) -> None:
    """The change is in a function that the graph calls by name, and so the graph is the same."""
    root, cache = tmp_path / "root", tmp_path / "cache"
    for folder in ("dora_fx", "passes", "tests"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    [before] = start("layers", 1, cache, root)
    source = root / "dora_fx" / "function" / "dropout.py"
    text = source.read_text()
    source.write_text(text.replace("0x7FEB352D", "0x7FEB352F"))
    assert source.read_text() != text
    [after] = start("layers", 1, cache, root)
    assert hits(after)[1] == 0
    assert_right(after)
    assert not torch.equal(after["compiled"]["loss"], before["compiled"]["loss"])
