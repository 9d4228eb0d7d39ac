"""The command for a GPU runs every step on a CPU too, and a step that fails, hangs or dies loses none of the others."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_checks
import gpu_measurements
from carried_wheels import download, unpack
from gpu_settings import Settings
from on_gpu import STEPS, Runner, Step, run_steps

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.py"
STEPS_OF_THE_TEST = """
import os, time

def machine(settings):
    return {"device": settings.device, "hidden": settings.hidden}

def fine(settings, value):
    print("is not in the JSON")
    return {"value": value, "warm_up": settings.warm_up, "shown": "a table"}

def wrong(settings):
    return {"ok": False, "error": 0.5}

def raises(settings):
    raise RuntimeError("out of memory")

def dies(settings):
    print("before the end", flush=True)
    os._exit(3)

def hangs(settings):
    time.sleep(600)
"""


def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *steps: str, minutes: float = 8.0) -> Runner:
    """Steps of the module above, which are run from a folder on the path."""
    (tmp_path / "steps_of_the_test.py").write_text(STEPS_OF_THE_TEST)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    options = {"device": "cpu", "quick": True, "minutes": minutes, "patience": 1.0, "json": tmp_path / "found.json"}
    arguments = {"fine": (7,)}
    named = {
        name: Step(f"steps_of_the_test.{name}", arguments.get(name, ()), limit_s=2 if name == "hangs" else 60)
        for name in steps
    }
    return Runner(argparse.Namespace(**options), named, tmp_path)


def found_by(made: Runner, jobs: int) -> dict[str, Any]:
    run_steps(made, list(made.steps), jobs)
    return json.loads(made.options.json.read_text(encoding="utf-8"))


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_step_loses_no_other(tmp_path, monkeypatch, jobs, capsys):
    made = runner(tmp_path, monkeypatch, "machine", "hangs", "raises", "dies", "wrong", "fine")
    found = found_by(made, jobs)
    assert found["machine"] == {"device": "cpu", "hidden": 32} and found["settings"]["quick"]
    steps = found["steps"]
    assert list(steps) == ["machine", "hangs", "raises", "dies", "wrong", "fine"]
    told = {name: (step["status"], step.get("reason")) for name, step in steps.items()}
    assert told == {
        "machine": ("done", None),
        "hangs": ("failed", "it took more than 2 s"),
        "raises": ("failed", "RuntimeError: out of memory"),
        "dies": ("failed", "exit status 3: before the end"),
        "wrong": ("wrong", "the result is not what it should be"),
        "fine": ("done", None),
    }
    assert steps["wrong"]["result"]["error"] == 0.5
    assert steps["fine"]["result"] == {"value": 7, "warm_up": False, "shown": "a table"}
    assert steps["hangs"]["seconds"] >= 2.0
    made.show()
    printed = capsys.readouterr().out
    assert "== fine\na table\n" in printed and "failed RuntimeError: out of memory" in printed


def test_without_a_device_or_time_the_others_are_skipped(tmp_path, monkeypatch):
    skipped = found_by(runner(tmp_path, monkeypatch, "raises", "fine"), 1)["steps"]["fine"]
    assert skipped == {"status": "skipped", "reason": "the step 'raises' failed"}
    late = found_by(runner(tmp_path, monkeypatch, "machine", "fine", minutes=0.01), 1)["steps"]
    assert late["machine"] == {"status": "skipped", "reason": "the 0.01 minutes are over"}
    assert late["fine"]["status"] == "skipped"


def test_steps_that_compile_nothing():
    settings = Settings.quick("cpu")
    about = gpu_checks.machine(settings)
    assert about["torch"] and about["megatron_core"] and about["date"]
    found = gpu_measurements.norms(settings)
    assert list(found["norms"]) == list(settings.norms)
    for comparison in found["norms"].values():
        assert comparison["table"]["dora_fx"]["error x 1e6"] < 10.0 and comparison["table"]["PEFT"]["kernels"] > 0
    assert "4096x4096x384" in Settings("cuda").norms


def test_a_function_that_is_off_is_wrong():
    exact = {"output": gpu_checks.torch.ones(4).double()}
    near, far = ({"output": exact["output"] * factor} for factor in (1.01, 1.05))
    errors = {"near": gpu_checks._errors(near, near, exact), "far": gpu_checks._errors(far, near, exact)}
    assert [row["ok"] for row in errors.values()] == [True, False]
    assert not gpu_checks._judged(errors)["ok"]


def test_generated_kernels_are_counted_by_kind():
    source = "\n".join(
        [
            "triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''''')",
            "def call(args):",
            "    extern_kernels.mm(arg0, arg1, out=buf0)",
            "    extern_kernels.addmm(arg2, arg0, arg1, alpha=1, beta=1, out=buf1)",
            "    triton_poi_fused_0.run(buf0, 64, stream=stream0)",
            "    triton_poi_fused_0.run(buf1, 64, stream=stream0)",
            "    triton_red_fused_1.run(buf1, 64, stream=stream0)",
        ]
    )
    assert gpu_measurements._generated(source) == {"products": 2, "pointwise": 2, "reduction": 1}


def test_wheels_are_unpacked(tmp_path):
    (tmp_path / "wheels").mkdir()
    with pytest.raises(ValueError, match="found no wheels"):
        unpack(tmp_path / "wheels", tmp_path / "packages")
    with zipfile.ZipFile(tmp_path / "wheels" / "some-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/__init__.py", "value = 1\n")
    unpack(tmp_path / "wheels", tmp_path / "packages")
    assert (tmp_path / "packages" / "some" / "__init__.py").read_text() == "value = 1\n"
    with pytest.raises(ValueError, match=r"found some-1.0-py3-none-any.whl, expected a new or empty folder"):
        download(tmp_path / "wheels", "3.12")


def test_bad_options_are_refused(tmp_path):
    for options, told in (
        ([f"--json={tmp_path}/none/found.json"], "found no folder"),
        (["--only", "nonsense"], "invalid choice"),
        (["--jobs=0"], "expected positive numbers"),
        (["--python=3.11"], "found no --prepare"),
        ([f"--prepare={tmp_path}/wheels", "--quick"], "found --quick beside it"),
        ([f"--wheels={tmp_path}", f"--json={tmp_path}/found.json"], "found no wheels"),
    ):
        command = [sys.executable, str(SCRIPT), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and told in done.stderr, done.stderr


@pytest.mark.slow
def test_every_step_runs_on_a_cpu(tmp_path):
    result = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--device=cpu", "--quick", "--minutes=30"]
    done = subprocess.run(
        [*command, "--patience=5", f"--json={result}"], capture_output=True, text=True, timeout=1800, cwd=tmp_path
    )
    found = json.loads(result.read_text(encoding="utf-8"))
    assert done.returncode == 0, f"{found}\n{done.stderr}"
    steps = {name: step["result"] for name, step in found["steps"].items()}
    assert steps.keys() == STEPS.keys()
    for name in ("correctness fp32", "correctness bf16", "correctness fp32 dropout", "correctness of a layer"):
        compilers = {key.rpartition(", ")[2] for key in steps[name]["errors"]}
        assert compilers == {"eager", "dora_fx"} and steps[name]["ok"], name
    for name in ("layer 512", "layer 4096", "layer 8192"):
        assert len(steps[name]["table"]) == 9 and not steps[name]["failed"], name
    assert not steps["CUDA graphs"]["failed"] and not steps["training"]["failed"]
    generated = {name: row["generated"] for name, row in steps["kernels"].items() if name != "shown"}
    assert all(direction["products"] > 4 for directions in generated.values() for direction in directions)
    assert all(row["look_ms"] > 0.0 for row in steps["looks"]["looks"].values())
