"""Wheels of what importing dora_fx needs beside torch, for a machine that has neither them nor a network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

# What importing dora_fx and Megatron-Core asks for; a machine with torch may lack numpy too.
PACKAGES = ["megatron-core>=0.16", "xxhash>=3.5", "packaging", "numpy"]
PLATFORMS = ["manylinux2014_x86_64", "manylinux_2_24_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"]
MOST_MIB = 64


def download(folder: Path, python: str) -> list[Path]:
    """Download the wheels for a version of Python on x86-64 Linux into a new or empty folder.

    Raises:
        ValueError: the folder holds something, or the wheels are larger than what is easily carried.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(path.name for path in folder.iterdir()):
        raise ValueError(f"{folder}: found {', '.join(found[:3])}, expected a new or empty folder")
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        options += ["--platform", platform]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), *PACKAGES]
    subprocess.run(command, check=True)
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    if size > MOST_MIB:
        raise ValueError(f"{folder}: found {size:.0f} MiB of wheels, expected at most {MOST_MIB}")
    return wheels


def unpack(folder: Path, into: Path) -> None:
    """Unpack the wheels of a folder, since extension modules are not imported from inside of one.

    Raises:
        ValueError: there are none.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"{folder}: found no wheels, expected those that --prepare downloads")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
