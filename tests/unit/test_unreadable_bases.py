"""Bases that some reader cannot read: whatever it raises, the command says one line with the file and a cure."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_fx.app.bases.base_model import resolve_base
from dora_fx.app.cli.main import main
from dora_fx.app.errors import UserError
from dora_fx.app.runs.progress import Display
from dora_fx.files.third_party import UnreadableFileError, is_out_of_memory, reading
from dora_fx.models import UnsupportedModelError, load_hf_checkpoint
from tests.gguf_models import write_gguf
from tests.hf_models import save_tiny_checkpoint, tiny_hf_model
from tests.tables import every_case

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "base")


def error_of(base: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a base; it must fail with exit code 2 and one line."""
    (base.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    capsys.readouterr()
    arguments = ["finetune", "--base", base, "--data", base.parent / "text.txt", "--run", base.parent / "run"]
    assert main(list(map(str, [*arguments, "--device", "cpu", "--sequence-length", 32]))) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"dora-fx: error: --base {base}") and shown.count("\n") == 1
    assert not (base.parent / "run").exists()
    return shown


def tokenizer_with(**fields: Any) -> Callable[[Path], Any]:
    """Change tokenizer.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content | fields))

    return change


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + size if size < 0 else size)


def as_pickle(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Weights as pytorch_model.bin, then a change of that file."""

    def write(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        change(folder / "pytorch_model.bin")

    return write


def in_place_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights_pointer": (written("model.safetensors", POINTER), "model.safetensors: found a Git LFS pointer"),
    "tokenizer_pointer": (written("tokenizer.json", POINTER), "tokenizer.json: found a Git LFS pointer"),
    "config_pointer": (written("config.json", POINTER), "config.json: found a Git LFS pointer"),
    "sentencepiece_pointer": (written("tokenizer.model", POINTER), "tokenizer.model: found a Git LFS pointer"),
    "weights_empty": (written("model.safetensors", b""), "model.safetensors: the file is empty; download it again"),
    "tokenizer_empty": (written("tokenizer.json", b""), "tokenizer.json: the file is empty; download it again"),
    "config_empty": (written("config.json", b""), "config.json: the file is empty; download it again"),
    "weights_page": (written("model.safetensors", b"<!DOCTYPE html><html>"), "model.safetensors: found a web page"),
    "tokenizer_page": (written("tokenizer.json", b"\n<HTML>"), "tokenizer.json: found a web page"),
    "weights_short": (cut("model.safetensors", -100), "model.safetensors: cannot be read (SafetensorError"),
    "weights_header_short": (cut("model.safetensors", 100), "model.safetensors: cannot be read (SafetensorError"),
    "weights_noise": (written("model.safetensors", bytes(range(256))), "model.safetensors: cannot be read"),
    "bin_pointer": (as_pickle(lambda file: file.write_bytes(POINTER)), "pytorch_model.bin: found a Git LFS pointer"),
    "bin_noise": (
        as_pickle(lambda file: file.write_bytes(b"noise")),
        "pytorch_model.bin: found no archive of torch.save (it is cut)",
    ),
    "bin_short": (
        as_pickle(lambda file: os.truncate(file, 3000)),
        "pytorch_model.bin: found no archive of torch.save (its last 22 bytes",
    ),
    "bin_list": (
        as_pickle(lambda file: torch.save([1], file)),
        "pytorch_model.bin: found a list, expected tensors by their names; download it again, or write it anew",
    ),
    "bin_numbers": (
        as_pickle(lambda file: torch.save({"a": 1}, file)),
        "pytorch_model.bin: found a int as 'a', expected tensors by their names; download it again",
    ),
    "config_damaged": (written("config.json", b'{"model_type": '), "config.json: cannot be read (JSONDecodeError"),
    "config_nested": (
        written("config.json", b"[" * 100_000),
        "config.json: cannot be read (values nested too deeply); download",
    ),
    "config_list": (written("config.json", b"[1]"), "config.json: found a list, expected an object; download it again"),
    "config_bytes": (written("config.json", b"\x00\xff\xfe"), "config.json: cannot be read (UnicodeDecodeError"),
    "config_unknown": (
        written("config.json", b'{"model_type": "of_the_future"}'),
        "config.json: found model_type = 'of_the_future', which is not supported; expected one of llama, mistral",
    ),
    "config_wrong_kind": (
        written("config.json", b'{"model_type": "llama", "num_attention_heads": "many"}'),
        "config.json: cannot be read (",
    ),
    "config_no_factor": (
        written("config.json", b'{"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}'),
        'config.json: cannot be read (KeyError: "Missing',
    ),
    # A plain Exception, which is what tokenizers raises for what it does not know.
    "tokenizer_newer": (
        tokenizer_with(model={"type": "OfTheFuture", "vocab": {}}),
        "tokenizer.json: cannot be read (Exception: data did not match any variant",
    ),
    "tokenizer_version": (tokenizer_with(version="2.0"), "tokenizer.json: cannot be read (Exception"),
    "tokenizer_regex": (
        tokenizer_with(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": 0}),
        "tokenizer.json: cannot be read (",
    ),
    # Panics, which are no Exception: one at loading, one at the first text.
    "tokenizer_panic": (
        tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json: cannot be read (PanicException",
    ),
    "tokenizer_late_panic": (
        tokenizer_with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}),
        "base: cannot be read (PanicException",
    ),
    "tokenizer_without_unknown": (
        tokenizer_with(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}),
        "base: cannot be read (Exception: WordLevel error",
    ),
    "tokenizer_config_list": (
        written("tokenizer_config.json", b"[]"),
        "tokenizer_config.json: found a list, expected an object; download it again",
    ),
    "tokenizer_class": (
        written("tokenizer_config.json", b'{"tokenizer_class": "OfTheFuture", "auto_map": {"AutoTokenizer": "a.B"}}'),
        "cannot be read (",
    ),
    "config_folder": (
        in_place_of("config.json", Path.mkdir),
        "config.json: found a directory, expected a regular file",
    ),
    "weights_folder": (in_place_of("model.safetensors", Path.mkdir), "model.safetensors: found a directory"),
    "weights_pipe": (
        in_place_of("model.safetensors", os.mkfifo),
        "model.safetensors: found a named pipe, expected a regular file; take",
    ),
    "tokenizer_pipe": (
        in_place_of("tokenizer.json", os.mkfifo),
        "tokenizer.json: found a named pipe, expected a regular file; take",
    ),
    "weights_gone": (lambda folder: (folder / "model.safetensors").unlink(), "base: found no weights, expected one of"),
    "weights_dangling": (
        in_place_of("model.safetensors", lambda file: file.symlink_to("gone")),
        "base: found no weights, expected one of",
    ),
}


@every_case("case", CASES)
def test_a_directory_that_cannot_be_read_is_one_line(case: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = CASES[case]
    damage(base)
    assert message in error_of(base, capsys)


@every_case(
    ("content", "message"),
    [
        (POINTER, "model.gguf: found a Git LFS pointer in place of the file; run: git lfs pull"),
        (b"", "model.gguf: the file is empty"),
        (b"<html>", "model.gguf: found a web page"),
        (
            b"GGML" + bytes(100),
            "model.gguf: found another kind of file, expected a GGUF file, which begins with GGUF; download it again",
        ),
        (
            b"GGUF\x09\0\0\0" + bytes(100),
            "model.gguf: found version 9 of GGUF, expected 2 or 3, little-endian; download it again",
        ),
        (b"GGUF", "model.gguf: found a header with 4 more bytes at 4, expected at most the 0 that are left; download"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_gguf_file_that_cannot_be_read_is_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert message in error_of(tmp_path / "model.gguf", capsys)


@every_case("share", [0.02, 0.1, 0.5, 0.99])
def test_half_a_gguf_file_is_one_line(share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model())
    os.truncate(path, int(share * path.stat().st_size))
    shown = error_of(path, capsys)
    # An offset behind the end in the header, or data that the reader of the tensors misses.
    assert " as the offset of 'blk." in shown or "model.gguf: cannot be read (ValueError: " in shown
    assert shown.endswith("; download it again, or convert it anew with llama.cpp\n")


def test_paths_that_are_no_base_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "pipe.gguf: found a named pipe, expected a regular file" in error_of(tmp_path / "pipe.gguf", capsys)
    assert "no such file or directory" in error_of(tmp_path / "loop", capsys)
    assert "File name too long" in error_of(tmp_path / ("x" * 300), capsys)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Be a user who owns nothing, where the tests run as the superuser, who may read everything."""
    euid = os.geteuid()
    if euid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(euid)


def test_files_that_may_not_be_read_are_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in base.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o777)
    config = base / "config.json"
    config.chmod(0)
    with without_rights(), pytest.raises(UnreadableFileError, match=r"config.json: Permission denied$"):
        load_hf_checkpoint(base)
    config.chmod(0o644)
    base.chmod(0o600)
    with without_rights(), pytest.raises(UserError, match=r"below: Permission denied$"):
        resolve_base(str(base / "below"), Display(quiet=True))


@pytest.mark.parametrize("command", ["export", "merge"])
def test_export_and_merge_say_it_too(command: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import dora_fx
    from dora_fx.megatron.world import megatron_world
    from tests.models import GPT_TARGETS
    from tests.peft_models import megatron_of

    with megatron_world():
        model = dora_fx.DoRA(GPT_TARGETS, dim=2)(megatron_of(tiny_hf_model()))
        dora_fx.save_checkpoint(model, base.parent / "saved")
    # The config last: it is read first.
    for name, message in (
        ("model.safetensors", "model.safetensors: found a Git LFS pointer in place of the file; run: git lfs pull"),
        ("config.json", "config.json: found a Git LFS pointer in place of the file; run: git lfs pull"),
    ):
        (base / name).write_bytes(POINTER)
        capsys.readouterr()
        arguments = [command, base.parent / "saved", "--base", base, "--to", base.parent / "new"]
        assert main(list(map(str, arguments))) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1
    assert not (base.parent / "new").exists()


def test_what_is_no_fault_of_a_file_passes_the_boundary() -> None:
    """A lack of memory, the package's own refusals, and whoever interrupts."""
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(2**60)
    assert is_out_of_memory(too_large.value) and not is_out_of_memory(RuntimeError("other"))
    for error in (too_large.value, MemoryError(), UnsupportedModelError("own"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)) as raised, reading(Path("file"), "cure"):
            raise error
        assert raised.value is error
    message = r"^file: cannot be read \(ZeroDivisionError: first\); cure$"
    with pytest.raises(UnreadableFileError, match=message), reading(Path("file"), "cure"):
        raise ZeroDivisionError("first\nsecond")
