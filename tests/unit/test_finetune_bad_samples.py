"""Samples that cannot be learned: one clear line each, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dora_fx.app.cli.finetune import without_packing_beside
from dora_fx.app.data.training_data import demo_data, read_data
from dora_fx.app.errors import UserError
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.models.specs import Spec
from tests.finetune_runs import finetune
from tests.sample_files import SAMPLES, options, texts, write, write_inputs
from tests.tables import every_case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of every run here."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "a"), ("assistant", "b"))


@every_case(
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
            [{"query": "a", "reply": "b"}],
            "found the fields 'query', 'reply', expected those of a format; ",
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


@every_case(
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


@pytest.mark.parametrize("spec", ["te", "hybrid"])
def test_an_attention_that_takes_no_mask_does_not_get_packed_samples(spec: Spec, folder: Path) -> None:
    """As Transformer Engine's, which is causal whatever the mask says."""
    samples, text = read_data(folder / "prompt-completion.jsonl", "auto"), demo_data("text")
    options = FinetuneOptions(data=folder / "x")
    assert without_packing_beside("local", options, samples) == (options, ())
    assert without_packing_beside(spec, options, text) == (options, ())
    chosen, notes = without_packing_beside(spec, options, samples)
    assert chosen == replace(options, no_packing=True) and notes == (
        f"the {spec} spec's attention does not separate packed samples: each sequence has one sample",
    )
    assert without_packing_beside(spec, chosen, samples) == (chosen, ())
    with pytest.raises(UserError, match=f"--spec: found {spec}, expected local: .* is trained on packed samples"):
        without_packing_beside(spec, replace(options, resume=folder / "run"), samples)
