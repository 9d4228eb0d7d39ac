"""Text becomes sequences: nothing lost, nothing trained on that is held out, the same order every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_fx.cli.data import cut_blocks, demo_documents, read_documents, tokenize, training_batch
from dora_fx.cli.errors import UserError


class ByteTokenizer:
    """A token per byte; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_text_files_are_one_document_and_jsonl_lines_are_many(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("\ufeffone\n\ntwo \u00e9".encode())
    lines.write_text('{"text": "one\\u2028x", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_documents(text) == ["one\n\ntwo \u00e9"]
    assert read_documents(lines) == ["one\u2028x", "two"]


def test_documents_end_with_the_end_of_text_token() -> None:
    assert tokenize(["ab", "c"], ByteTokenizer()).tolist() == [97, 98, 0, 99, 0]


def test_blocks_cover_the_text_and_share_only_the_token_between_them() -> None:
    blocks = cut_blocks(torch.arange(104), sequence_length=10, held_out_fraction=0.3, max_held_out=50)
    assert blocks.num_tokens == 104
    rows = sorted(blocks.train.tolist() + blocks.held_out.tolist())
    assert rows == [list(range(first, first + 11)) for first in range(0, 100, 10)]
    assert blocks.held_out[:, 0].tolist() == [10, 40, 70]


def test_held_out_blocks_are_limited_and_spread_over_the_text() -> None:
    blocks = cut_blocks(torch.arange(1001), sequence_length=10, held_out_fraction=0.5, max_held_out=4)
    assert blocks.held_out[:, 0].tolist() == [10, 250, 510, 750]
    assert len(blocks.train) == 50


def test_too_little_text_is_refused_with_the_amount_needed() -> None:
    with pytest.raises(UserError, match="the text has 20 tokens, expected at least 21"):
        cut_blocks(torch.arange(20), sequence_length=10, held_out_fraction=0.1, max_held_out=8)


def test_other_text_has_another_fingerprint() -> None:
    first, second = (
        cut_blocks(torch.arange(40) + shift, sequence_length=4, held_out_fraction=0.1, max_held_out=8)
        for shift in (0, 1)
    )
    assert first.fingerprint != second.fingerprint


def test_batches_visit_every_block_once_an_epoch_in_an_order_of_its_own() -> None:
    blocks = torch.arange(6)[:, None]
    epochs = [
        [row for index in range(3 * epoch, 3 * epoch + 3) for row in training_batch(blocks, 2, index, 7)[:, 0].tolist()]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    assert training_batch(blocks, 2, 4, 7).tolist() == training_batch(blocks, 2, 4, 7).tolist()
    assert training_batch(blocks, 6, 0, 8)[:, 0].tolist() != epochs[0]


def test_a_batch_may_cross_epochs() -> None:
    blocks = torch.arange(3)[:, None]
    rows = [row for index in range(3) for row in training_batch(blocks, 2, index, 0)[:, 0].tolist()]
    assert sorted(rows[:3]) == sorted(rows[3:]) == [0, 1, 2]


def test_the_demo_text_is_in_every_python() -> None:
    assert sum(map(len, demo_documents())) > 400_000
