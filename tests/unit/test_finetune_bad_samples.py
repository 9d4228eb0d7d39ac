"""Samples that cannot be learned: one clear line each, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dora_fx.cli.data import read_data
from dora_fx.cli.errors import UserError
from dora_fx.cli.finetune import _check_separable
from dora_fx.cli.options import FinetuneOptions
from dora_fx.cli.tokens import BaseTokenizer
from dora_fx.cli.training_text import training_text
from tests.finetune_runs import finetune
from tests.hf_models import tiny_hf_config, tiny_tokenizer
from tests.sample_files import SAMPLES, options, texts, write, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of every run here."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [GOOD, {"messages": [{"content": "a"}]}],
            "line 2, turn 1: found the fields 'content', expected an obje",
        ),
        ([GOOD, chat(("user", "a"), ("bot", "b"))], "line 2, turn 2: found 'bot' as role, expected one of system"),
        ([GOOD, chat(("user", "a"), ("assistant", ""))], "line 2, turn 2: found an empty turn of the assistant"),
        ([GOOD, chat(("user", "a"))], "line 2: found no turn of the assistant among 1"),
        ([GOOD, {"text": "a"}], "line 2: found the fields 'text', expected those of messages (messages), which"),
        ([{"text": "a"}, GOOD], "it is of the format messages, and a file or folder has one format"),
        ([GOOD | {"text": "a"}], "say which with --data-format text or messages"),
        (
            [{"question": "a", "answer": "b"}],
            "found the fields 'question', 'answer', expected those of a format; ",
        ),
        ([GOOD, ["a"]], "line 2: found a list, expected an object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_samples_are_named_before_anything_is_loaded(
    records: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", records)
    # The base does not exist either, and would be named if it were looked at first.
    assert finetune("--data", data, "--base", "nowhere", "--run", tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dora-fx: error: --data {data}, line ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("messages.jsonl", (), "line 1: found a conversation, but the base's tokenizer has no chat template"),
        ("sharegpt.jsonl", (), "line 1: found a conversation, but the base's tokenizer has no chat template"),
        (
            "messages.jsonl",
            ("--data-format", "alpaca"),
            "expected those of alpaca (instruction, output), which --",
        ),
        ("messages.jsonl", ("--data-format", "chat"), "--data-format: Expected Literal['auto', 'text', 'messages', "),
        ("one.jsonl", (), "one.jsonl: found one sample, expected at least two"),
        ("broken.parquet", (), "broken.parquet: cannot be read (ArrowInvalid: "),
        ("text.txt", ("--no-packing",), "--no-packing: found texts, which are cut into sequences"),
        ("text.txt", ("--too-long", "cut"), "--too-long: found texts, which are cut into sequences"),
    ],
)
def test_data_that_do_not_suit_the_base_or_the_options_are_named(
    data: str, more: tuple[object, ...], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "one.jsonl", [SAMPLES["prompt-completion"](*texts(0))])
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    (folder / "text.txt").write_text("some text. " * 100)
    assert finetune(*options(folder, data, "--run", tmp_path / "run", *more, base="plain")) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_attention_that_takes_no_mask_does_not_get_packed_samples(folder: Path, world: None) -> None:
    """As Transformer Engine's, which is causal whatever the mask says."""

    class CausalAttention(nn.Module):
        pass

    base = BaseTokenizer(folder / "plain", tiny_tokenizer(), 64)
    data = read_data(folder / "prompt-completion.jsonl", "auto")
    model = nn.ModuleDict({"core_attention": CausalAttention()})
    for no_packing in (False, True):
        chosen = FinetuneOptions(data=folder / "x", sequence_length=64, no_packing=no_packing)
        text = training_text(chosen, data, base, tiny_hf_config(), "cpu")
        if no_packing:
            _check_separable(text, model)
        else:
            with pytest.raises(UserError, match="--no-packing: expected with this model"):
                _check_separable(text, model)
