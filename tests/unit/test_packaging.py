"""What an installed copy holds is what the checkout holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "dora_fx").rglob("__init__.py")}
    assert set(listed) == found | {"dora_fx.passes"}


def test_the_passes_are_reached_through_a_relative_link():
    link = ROOT / "dora_fx" / "passes"
    assert link.is_symlink() and link.readlink() == Path("../passes")


WITHOUT_THE_COMMAND = """
import importlib, pkgutil, sys

# What the library declares is torch, megatron-core and xxhash; the command's packages are not there.
for name in ("accelerate", "gguf", "jsonargparse", "matplotlib", "peft", "pyarrow", "rich", "safetensors",
             "tensorboard", "transformers", "wandb", "yaml"):
    sys.modules[name] = None
import dora_fx
for module in pkgutil.walk_packages(dora_fx.__path__, "dora_fx."):
    importlib.import_module(module.name)
missing = [name for name in dora_fx.__all__ if getattr(dora_fx, name) is None]
import torch
model = dora_fx.DoRA(target_modules=["0"], dim=2)(torch.nn.Sequential(torch.nn.Linear(6, 4)))
print(missing, tuple(model(torch.ones(2, 6)).shape))
"""


def test_the_library_installs_and_runs_without_the_command(tmp_path):
    shutil.copytree(ROOT / "dora_fx", tmp_path / "dora_fx", ignore=shutil.ignore_patterns("app", "__pycache__"))
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_COMMAND],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[] (2, 4)\n"
