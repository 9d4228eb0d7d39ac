"""A GGUF file that counts more than it holds is refused before a reader makes room for it.

Beside it stands what the reader does without the check.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import transformers

from dora_fx.files.gguf_header import check_gguf_file
from dora_fx.models import load_hf_checkpoint
from tests.gguf_models import write_gguf
from tests.hf_models import tiny_hf_model, tiny_tokenizer
from tests.tables import every_case
from tests.unit.hostile_files import is_endless
from tests.unit.refused_bases import refused

READ_GGUF = "import sys\nfrom gguf import GGUFReader\npass\nGGUFReader(sys.argv[1])"
ENDLESS = 1 << 60


def number(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def text(value: str) -> bytes:
    return number(len(value)) + value.encode()


def kind(value: int) -> bytes:
    return struct.pack("<I", value)


def gguf(num_tensors: int, num_values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + kind(3) + number(num_tensors, num_values) + rest


GGUF_FILES = {
    "array": (gguf(0, 1, text("a") + kind(9) + kind(4) + number(ENDLESS)), "elements of 'a' and the arrays before it"),
    "strings": (gguf(0, 1, text("a") + kind(9) + kind(8) + number(ENDLESS)), "elements of 'a' and the arrays before"),
    "values": (gguf(0, ENDLESS), "found .* values, expected at most 65,536"),
    "tensors": (gguf(ENDLESS, 0), "found .* tensors, expected at most 262,144"),
    "text": (gguf(0, 1, number(ENDLESS)), "a header with .* more bytes at 32, expected at most the 0 that are left"),
    "dimensions": (gguf(1, 0, text("a") + kind(ENDLESS % 2**32 + 2**31)), "dimensions of 'a', expected at most 8"),
    "elements": (
        gguf(1, 0, text("a") + kind(2) + number(1 << 40, 1 << 40) + kind(0) + number(0)),
        "elements of tensors, expected at most",
    ),
    "offset": (gguf(1, 0, text("a") + kind(1) + number(4) + kind(0) + number(ENDLESS)), "as the offset of 'a'"),
    "kind": (gguf(0, 1, text("a") + kind(77)), "of type 77 as 'a', expected one of GGUF's"),
    "nested": (gguf(0, 1, text("a") + kind(9) + kind(9) + number(2)), "of type 9 as 'a', expected one of GGUF's"),
    "layers": (gguf(0, 1, text("llama.block_count") + kind(10) + number(ENDLESS)), "as num_hidden_layers"),
    "again": (
        gguf(
            0, 2, text("qwen2.block_count") + kind(10) + number(ENDLESS) + text("z.block_count") + kind(10) + number(2)
        ),
        "found 1152921504606846976 as num_hidden_layers",
    ),
    "magic": (b"GGML" + number(0, 0, 0), "expected a GGUF file, which begins with GGUF"),
    "version": (b"GGUF" + struct.pack(">I", 3) + number(0, 0), "expected 2 or 3, little-endian"),
    "cut": (gguf(1, 1)[:20], "a header with 8 more bytes"),
    "empty": (b"", "the file is empty"),
}


@every_case("name", GGUF_FILES)
def test_gguf_counts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = GGUF_FILES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert len(content) <= 100
    if name == "array":
        assert is_endless(READ_GGUF, path)
    refused(path, message, capsys)


def test_a_gguf_file_within_its_size(tmp_path: Path) -> None:
    values = text("a") + kind(9) + kind(8) + number(2) + text("b") + text("c") + text("d") + kind(6) + b"1234"
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(1, 2, values + text("a") + kind(1) + number(4) + kind(0) + number(0)) + bytes(16))
    check_gguf_file(path)


def test_files_beside_a_gguf_file_are_not_opened(tmp_path: Path) -> None:
    """transformers takes the tokenizer of another model that lies beside it."""
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model())
    expected = load_hf_checkpoint(path).tokenizer("the quick brown").input_ids
    tiny_tokenizer().save_pretrained(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert other("the quick brown").input_ids == tiny_tokenizer()("the quick brown").input_ids != expected
    assert load_hf_checkpoint(path).tokenizer("the quick brown").input_ids == expected
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
    assert load_hf_checkpoint(path).tokenizer("the quick brown").input_ids == expected
