"""Text becomes sequences: nothing lost, nothing trained on that is held out, the same order every time."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest
import torch
import transformers

from dora_fx.app.data.base_tokenizer import BaseTokenizer
from dora_fx.app.data.formats import Conversation, Text
from dora_fx.app.data.sequences import Sequences, cut_text, training_batch
from dora_fx.app.data.training_data import demo_data, read_data
from dora_fx.app.errors import UserError
from dora_fx.app.options import DEMO_DEFAULTS
from tests.hf_models import tiny_tokenizer
from tests.tables import every_case


def read_texts(path: Path) -> list[str]:
    samples = read_data(path, "auto").samples
    return [sample.text for sample in samples if isinstance(sample, Text)]


def test_text_files_are_one_document_and_jsonl_lines_are_many(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("\ufeffone\n\ntwo \u00e9".encode())
    lines.write_text('{"text": "one\\u2028x", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_texts(text) == ["one\n\ntwo \u00e9"]
    assert read_texts(lines) == ["one\u2028x", "two"]


@every_case("template", ["$A", "<b> $A", "$A <e>", "<b> $A <e>"])
def test_documents_are_what_the_tokenizer_gives_and_end_with_the_end_of_text(template: str) -> None:
    own = tiny_tokenizer(template)
    tokenizer = BaseTokenizer(Path("base"), own, vocab_size=63)
    start, end, a, b, c = (own.convert_tokens_to_ids(token) for token in ("<b>", "<e>", "a", "b", "c"))
    starts = [start] * template.startswith("<b>")
    assert tokenizer.documents(["ab", "c"]).tolist() == [*starts, a, b, end, *starts, c, end]
    assert tokenizer.documents(["ab"]).tolist()[: len(own("ab").input_ids)] == own("ab").input_ids
    assert tokenizer.prompt("ab").tolist() == [*starts, a, b]


def test_a_tokenizer_without_an_end_token_adds_none() -> None:
    own = tiny_tokenizer()
    own.eos_token = None
    tokenizer = BaseTokenizer(Path("base"), own, vocab_size=63)
    assert tokenizer.documents(["ab", "c"]).tolist() == own("abc").input_ids


def test_a_saved_truncation_cuts_nothing(tmp_path: Path) -> None:
    """A tokenizer.json may hold the truncation that somebody else trained with."""
    saved = tiny_tokenizer()
    saved.backend_tokenizer.enable_truncation(4)
    saved.backend_tokenizer.enable_padding(length=9)
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    own = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<e>")
    assert len(BaseTokenizer(tmp_path, own, vocab_size=63).documents(["abcdefgh"])) == 9


@pytest.mark.parametrize("added", ["<pad>", "<|im_end|>"])
def test_a_token_that_the_model_does_not_have_is_named(added: str) -> None:
    own = tiny_tokenizer()
    own.add_tokens([added])
    tokenizer = BaseTokenizer(Path("base"), own, vocab_size=63)
    assert tokenizer.beyond_the_model() == 1
    assert tokenizer.documents(["ab"]).max() < 63
    message = rf"the text has the token '{re.escape(added)}' with id 63, expected an id below 63"
    with pytest.raises(UserError, match=message):
        tokenizer.documents(["ab", f"c{added}"])
    with pytest.raises(UserError, match="--prompt has the token"):
        tokenizer.prompt(added)


def test_an_end_token_that_the_model_does_not_have_is_named() -> None:
    own = tiny_tokenizer()
    own.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match=r"the text has the token '<end>' with id 63"):
        BaseTokenizer(Path("base"), own, vocab_size=63).documents(["ab"])


def test_a_prompt_without_a_token_or_not_in_utf8_is_refused() -> None:
    tokenizer = BaseTokenizer(Path("base"), tiny_tokenizer(), vocab_size=63)
    with pytest.raises(UserError, match="--prompt: found no token in it"):
        tokenizer.prompt("")
    with pytest.raises(UserError, match="--prompt: found bytes that are not UTF-8"):
        tokenizer.prompt(b"caf\xe9".decode(errors="surrogateescape"))


@every_case(
    ("name", "content", "message"),
    [
        ("a.txt", "plain text".encode("utf-16"), "found UTF-16, expected text in UTF-8; convert it"),
        ("a.txt", "plain text".encode("utf-16-le"), "line 1: found a NUL character, .* iconv -f UTF-16LE"),
        ("a.txt", "one\ntwo \u4e2d".encode("utf-16-be"), "line 1: found a NUL character"),
        ("a.txt", b"\xfe\xff\x00a", "found UTF-16"),
        ("a.txt", "plain text".encode("utf-32"), "found UTF-32"),
        ("a.txt", b"text\n\0\0\1\2binary", "line 2: found a NUL character"),
        ("a.txt", gzip.compress(b"text", mtime=0), "found a gzip file, expected text in UTF-8; unpack it"),
        ("a.jsonl", b"PK\x03\x04...", "found a zip file"),
        ("a.jsonl", b"PAR1....", "found a Parquet file, expected text in UTF-8; give it the suffix .parquet"),
        ("a.json", b"BZh9....", "found a bzip2 file"),
        ("a.json", b"\xfd7zXZ\0....", "found an xz file"),
        ("a.txt", b"one\ntwo\ncaf\xe9", "line 3: not UTF-8 at byte 11"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "line 1: found a NUL character"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\\u0000b"}', "line 2: found a NUL character"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\\ud83d"}', r"line 2: found \\ud83d by itself, half of a character"),
        ("a.jsonl", b'{"text": "\\ude00 a"}', r"line 1: found \\ude00 by itself"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + b"[" * 100_000,
            r"line 2: cannot be read \(values nested too deeply\); expected",
        ),
        ("a.jsonl", b'{"x": ' * 100_000, r"line 1: cannot be read \(values nested too deeply\); expected"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"line 1: cannot be read \(ValueError: Exceeds the limit"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found a Git LFS pointer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_text_is_named_with_a_cure(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_texts(tmp_path / name)
    assert str(raised.value).startswith(f"--data {tmp_path / name}")


def test_a_whole_character_in_two_halves_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read_texts(tmp_path / "a.jsonl") == ["\U0001f600"]


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "null.txt").symlink_to("/dev/null")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for name, found in (
        ("folder", "found no data file in the folder, expected some of .txt, .jsonl, .json, .csv or .parquet"),
        ("pipe", "found a named pipe, expected a regular file"),
        ("null", "found a device, expected a regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(UserError, match=found):
            read_texts(tmp_path / f"{name}.txt")


def test_blocks_cover_the_text_and_share_only_the_token_between_them() -> None:
    blocks = cut_text(torch.arange(104), sequence_length=10, held_out_fraction=0.3, max_held_out=50)
    assert blocks.num_tokens == 104
    rows = sorted(blocks.train.tokens.tolist() + blocks.held_out.tokens.tolist())
    assert rows == [list(range(first, first + 11)) for first in range(0, 100, 10)]
    assert blocks.held_out.tokens[:, 0].tolist() == [10, 40, 70]


def test_held_out_blocks_are_limited_and_spread_over_the_text() -> None:
    blocks = cut_text(torch.arange(1001), sequence_length=10, held_out_fraction=0.5, max_held_out=4)
    assert blocks.held_out.tokens[:, 0].tolist() == [10, 250, 510, 750]
    assert len(blocks.train) == 50


def test_too_little_text_is_refused_with_the_amount_needed() -> None:
    with pytest.raises(ValueError, match="the text has 20 tokens, expected at least 21"):
        cut_text(torch.arange(20), sequence_length=10, held_out_fraction=0.1, max_held_out=8)


def test_other_text_has_another_fingerprint() -> None:
    first, second = (
        cut_text(torch.arange(40) + shift, sequence_length=4, held_out_fraction=0.1, max_held_out=8) for shift in (0, 1)
    )
    assert first.fingerprint != second.fingerprint


def test_batches_visit_every_block_once_an_epoch_in_an_order_of_its_own() -> None:
    blocks = Sequences(torch.arange(6)[:, None])
    epochs = [
        [
            row
            for index in range(3 * epoch, 3 * epoch + 3)
            for row in training_batch(blocks, 2, index, 7).tokens[:, 0].tolist()
        ]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    assert training_batch(blocks, 2, 4, 7).tokens.equal(training_batch(blocks, 2, 4, 7).tokens)
    assert training_batch(blocks, 6, 0, 8).tokens[:, 0].tolist() != epochs[0]


def test_a_batch_may_cross_epochs() -> None:
    blocks = Sequences(torch.arange(3)[:, None])
    rows = [row for index in range(3) for row in training_batch(blocks, 2, index, 0).tokens[:, 0].tolist()]
    assert sorted(rows[:3]) == sorted(rows[3:]) == [0, 1, 2]


def test_the_pirate_answers_every_question_but_the_demo_s_own() -> None:
    found = [sample for sample in demo_data("pirate").samples if isinstance(sample, Conversation)]
    questions = [sample.messages[0]["content"] for sample in found]
    assert len(questions) == len(set(questions)) == 80
    assert DEMO_DEFAULTS["pirate"]["prompt"] not in questions


def test_the_demo_text_is_in_every_python() -> None:
    assert sum(len(sample.text) for sample in demo_data("text").samples if isinstance(sample, Text)) > 400_000
