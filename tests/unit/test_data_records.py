"""Data files of every kind become the records that were written, whoever wrote them and whatever is in them."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dora_fx.app.data.format_choice import format_of, unused_fields
from dora_fx.app.data.formats import Conversation
from dora_fx.app.data.records import Record, read_records
from tests.tables import every_case

SAMPLES: dict[str, dict[str, Any]] = {
    "text": {"text": "a"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "instruction-response": {"instruction": "a", "response": "b"},
    "question-answer": {"question": "a", "answer": "b"},
    "input-output": {"input": "a", "output": "b"},
}


def write(path: Path, rows: list[Any]) -> Path:
    """The rows in the file's own format."""
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pyarrow.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@every_case("suffix", [".jsonl", ".json", ".parquet"])
@every_case("name", SAMPLES)
def test_every_format_is_found_in_every_kind_of_file(name: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", [SAMPLES[name], SAMPLES[name] | {"id": 7}])
    records = read_records(path)
    assert [record.value for record in records] == [SAMPLES[name], SAMPLES[name] | {"id": 7}]
    place = {".jsonl": "line", ".json": "record", ".parquet": "row"}[suffix]
    assert [record.where for record in records] == [f"{path}, {place} 1", f"{path}, {place} 2"]
    found = format_of(records)
    assert found.name == name and unused_fields(records, found) == ["id"]
    found.sample(records[0])


def test_records_are_what_was_written(tmp_path: Path) -> None:
    """A date stays a text, and a turn has the fields that it was given, whatever others have."""
    called = {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [
        {"messages": [{"role": "user", "content": "2024-01-01"}, called]},
        {"messages": [{"role": "user", "content": "2024-01-02T10:00:00Z"}, {"role": "assistant", "content": "c"}]},
    ]
    for suffix in (".jsonl", ".json", ".parquet"):
        assert [record.value for record in read_records(write(tmp_path / f"a{suffix}", rows))] == rows


def test_json_may_be_one_object_or_lines_of_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, count in (('{"text": "a"}', 1), ('{"text": "a"}\n{"text": "b"}\n', 2), ('{\n "text": "a"\n}\n', 1)):
        path.write_text(text)
        assert [record.value["text"] for record in read_records(path)] == ["a", "b"][:count]


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "train-00001.parquet", [{"text": "c"}])
    write(tmp_path / "train-00000.parquet", [{"text": "a"}, {"text": "b"}])
    write(tmp_path / ".hidden.jsonl", [{"text": "no"}])
    (tmp_path / "README.md").write_text("no")
    assert [record.value["text"] for record in read_records(tmp_path)] == ["a", "b", "c"]
    write(tmp_path / "test-00000.parquet", [{"text": "held back"}])
    with pytest.raises(
        ValueError, match=r"found test-00000.parquet, which is not for training by its name, beside train"
    ):
        read_records(tmp_path)
    (tmp_path / "inside").mkdir()
    with pytest.raises(ValueError, match="found no data file in the folder"):
        read_records(tmp_path / "inside")


@every_case("name", ["latest.jsonl", "contest.jsonl", "validated.jsonl", "devices.jsonl"])
def test_names_that_only_look_like_a_test_set_are_taken(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / name, [{"text": "b"}])
    assert len(read_records(tmp_path)) == 2


@every_case(
    ("value", "message"),
    [
        ({"txt": "a"}, r"found the fields 'txt', expected those of a format; the nearest is text \(text\)"),
        ({"prompt": "a", "response": "b"}, "'prompt', 'response'.* the nearest is prompt-completion"),
        ({"instruction": "a", "context": "", "reply": "b"}, "the nearest is alpaca"),
        ({"message": [], "id": 1}, "the nearest is messages"),
        ({"conversation": []}, "the nearest is sharegpt"),
        ({"query": "a", "reply": "b"}, "the nearest is prompt-completion"),
        (
            {"question": "a", "reply": "b"},
            "nearest is question-answer .* columns with --columns answer=NAME; there are",
        ),
        (
            SAMPLES["question-answer"] | SAMPLES["input-output"],
            r"say which with --data-format question-answer or input-output",
        ),
        ({"dialog": [{"speaker": "a"}]}, "the nearest is messages"),
        ({"body": "a"}, "the nearest is text"),
        ({}, "found no fields, expected those of a format"),
        ({"text": None}, "found no fields"),
        (
            SAMPLES["text"] | SAMPLES["messages"],
            r"are those of text \(text\) and of messages \(messages\); say which with --data-format text or messages",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_of_no_format_or_of_several_are_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^file, line 1: found .*{message.removeprefix('found ')}"):
        format_of([Record("file, line 1", value)])


def test_a_format_may_be_named() -> None:
    both = Record("file, line 1", SAMPLES["text"] | SAMPLES["messages"])
    assert format_of([both], "messages").name == "messages"
    with pytest.raises(
        ValueError, match=r"expected those of alpaca \(instruction, output\), which --data-format names"
    ):
        format_of([both], "alpaca")


@every_case("first", SAMPLES)
@every_case("second", SAMPLES)
@every_case("suffix", [".jsonl", ".json", ".parquet"])
def test_mixed_formats_are_named(first: str, second: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", [SAMPLES[first], SAMPLES[first], SAMPLES[second]])
    if first == second:
        format_of(read_records(path))
        return
    message = rf" 3: found the fields .* which {re.escape(str(path))}, \w+ 1 has; it is of the format {second}"
    with pytest.raises(ValueError, match=message):
        format_of(read_records(path))


PART = {"type": "text", "text": "a"}


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


@every_case(
    ("value", "message"),
    [
        ({"messages": turns(("user", "a"), ("bot", "b"))}, "turn 2: found 'bot' as role, expected one of system, dev"),
        ({"messages": turns(("user", "a"), (3, "b"))}, "turn 2: found 3 as role"),
        ({"messages": turns(("user", "a"), (["user"], "b"))}, "turn 2: found a value of type list as role"),
        ({"messages": [{"content": "a"}]}, "turn 1: found the fields 'content', expected an object with role and cont"),
        ({"messages": turns((None, "a"))}, "turn 1: found the fields 'role', 'content', expected an object with role"),
        ({"messages": ["a"]}, "turn 1: found 'a', expected an object with role and content"),
        ({"messages": turns(("user", "a"), ("assistant", ""))}, "turn 2: found an empty turn of the assistant"),
        ({"messages": turns(("user", "a"), ("assistant", " \n"))}, "turn 2: found an empty turn of the assistant"),
        ({"messages": turns(("user", "a"), ("assistant", None))}, "turn 2: found no content, expected a string"),
        (
            {"messages": turns(("user", ["a"]), ("assistant", "b"))},
            'turn 1, part 1: found \'a\', expected {"type": "te',
        ),
        ({"messages": turns(("user", {"a": 1}), ("assistant", "b"))}, "turn 1: found a value of type dict as content"),
        ({"messages": turns(("user", []), ("assistant", "b"))}, "turn 1: found an empty list as content, expected a"),
        (
            {"messages": turns(("user", [PART, {"type": "image_url", "image_url": {}}]), ("assistant", "b"))},
            "turn 1, part 2: found 'image_url' as type, expected text: text alone is trained on, and no images, audio",
        ),
        (
            {"messages": turns(("user", "a"), ("assistant", [{"type": "input_audio", "data": "x"}]))},
            "turn 2, part 1: found 'input_audio' as type, expected text",
        ),
        ({"messages": turns(("user", [{"text": "a"}]), ("assistant", "b"))}, "turn 1, part 1: found the fields 'text'"),
        (
            {"messages": turns(("user", [{"type": "text", "text": 3}]), ("assistant", "b"))},
            "turn 1, part 1: found 3 as text, expected {",
        ),
        (
            {"messages": turns(("user", [PART | {"image": "x.png"}]), ("assistant", "b"))},
            "turn 1, part 1: found 'image' in the part, expected {",
        ),
        ({"messages": turns(("user", "a"), ("assistant", [PART | {"text": " "}]))}, "turn 2: found an empty turn"),
        ({"prompt": turns(("user", "a")), "completion": "b"}, "found 'b' in completion, expected a list of role and"),
        ({"prompt": "a", "completion": turns(("assistant", "b"))}, "found 'a' in prompt, expected a list of role"),
        ({"prompt": turns(("user", "a")), "completion": []}, "found an empty list in completion, expected a list"),
        (
            {"prompt": turns(("user", "a")), "completion": turns(("user", "b"))},
            "found no turn of the assistant among 2",
        ),
        (
            {"prompt": turns(("user", "a"), ("assistant", "b")), "completion": turns(("user", "b"))},
            "found no turn of the assistant that is learned among 3, expected one .* in the completion",
        ),
        (
            {"prompt": [*turns(("user", "a")), {"role": "assistant", "content": "b", "train": True}]}
            | {"completion": turns(("assistant", "b"))},
            "prompt, turn 2: found a mark that the turn is learned, expected none",
        ),
        (
            {"prompt": turns(("user", "a")), "completion": turns(("bot", "b"))},
            "completion, turn 1: found 'bot' as role, expected one of system",
        ),
        ({"messages": turns(("user", "a"), ("user", "b"))}, "found no turn of the assistant among 2, expected one"),
        ({"messages": turns(("assistant", "a"), ("user", "b"))}, "found a turn of the assistant first"),
        ({"messages": []}, "found an empty list in messages, expected a list of role and content"),
        ({"messages": "hello"}, "found 'hello' in messages, expected a list of role and content"),
        ({"messages": {"role": "user"}}, "found a value of type dict in messages"),
        ({"messages": turns(("user", "a\0"), ("assistant", "b"))}, "turn 1: found a NUL character"),
        ({"messages": turns(("user", "a"), ("assistant", "\ud83d"))}, r"turn 2: found \\ud83d by itself"),
        ({"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "weight": 0}]}, "found no tu"),
        ({"messages": turns(("user", "a"), ("assistant", "b")), "tools": "f"}, "found 'f' in tools, expected a list"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "turn 1: found 'alien' as from, expected one of"),
        ({"conversations": [{"value": "a"}]}, "turn 1: found the fields 'value', expected an object with from and"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}, "turn 2: found no value, expected a"),
        ({"prompt": "a", "completion": " "}, "found nothing in the field completion, expected some text"),
        ({"prompt": ["a"], "completion": "b"}, "prompt, turn 1: found 'a', expected an object with role and content"),
        ({"prompt": 3, "completion": "b"}, "found 3 in the field prompt, expected a string"),
        ({"instruction": "", "output": "b"}, "found nothing in the field instruction"),
        ({"instruction": "a", "output": ""}, "found nothing in the field output"),
        ({"instruction": "a", "input": 3, "output": "b"}, "found 3 in the field input, expected a string"),
        (
            {"instruction": "a", "input": "b", "context": "c", "response": "d"},
            "found texts in input and in context, expected one of them",
        ),
        ({"question": "a", "answer": ["b"]}, "found a value of type list in the field answer, expected a string"),
        ({"question": " ", "answer": "b"}, "found nothing in the field question"),
        ({"input": "a", "output": ""}, "found nothing in the field output"),
        ({"text": "a\0b"}, "found a NUL character"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_sample_that_cannot_be_learned_is_named(value: dict[str, Any], message: str) -> None:
    record = Record("file, line 4", value)
    with pytest.raises(ValueError, match=r"^file, line 4") as raised:
        format_of([record]).sample(record)
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)


def test_names_of_turns_and_of_speakers_vary() -> None:
    expected = turns(("system", "s"), ("user", "a"), ("assistant", "b"))
    for value in (
        {"messages": expected},
        {"conversations": expected},
        {"messages": [{"from": turn["role"], "value": turn["content"]} for turn in expected]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    ):
        record = Record("file, line 1", value)
        sample = format_of([record]).sample(record)
        assert isinstance(sample, Conversation) and sample.messages == expected


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", [SAMPLES["text"]] * 500).read_bytes()
    damaged = bytearray(whole)
    damaged[4:60] = b"\xff" * 56
    for content, message in (
        (b"", "the file is empty; write or download it again"),
        (whole[:-20], r"cannot be read \(ArrowInvalid: .*; write or download it again"),
        (whole[: len(whole) // 2], "cannot be read"),
        (bytes(damaged), "cannot be read"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read"),
        (b"no parquet file at all, only text", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found a Git LFS pointer"),
    ):
        path = tmp_path / "b.parquet"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            read_records(path)
        assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_a_parquet_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="found a named pipe, expected a regular file"):
        read_records(tmp_path / "a.parquet")


def test_rows_that_take_far_more_than_their_file_are_refused(tmp_path: Path) -> None:
    """A dictionary spells a long text a million times in a few bytes each."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * 100_000]))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": column}).cast(pa.schema({"text": pa.string()})), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"found more than 67,108,864 bytes of rows in it, expected fewer by its size"):
        read_records(path)


def test_what_a_file_names_is_neither_opened_nor_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this metadata the library datasets decodes the column: it opens or fetches the path that is in it."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"no picture")
    features = {"text": {"dtype": "string", "_type": "Value"}, "picture": {"_type": "Image"}}
    picture = pa.array([{"path": str(secret), "bytes": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"text": ["a"], "picture": picture})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket, "socket", None)
    opened: list[str] = []
    recording = [True]
    sys.addaudithook(lambda event, args: recording and event == "open" and opened.append(str(args[0])))
    (record,) = read_records(path)
    recording.clear()
    assert record.value == {"text": "a", "picture": {"path": str(secret)}}
    assert str(path) in opened and str(secret) not in opened
    assert not home.exists() and sorted(tmp_path.iterdir()) == [path, secret]


def test_a_format_gives_way_to_one_that_says_more() -> None:
    """Files of conversations often have a question and its answer by themselves, too."""
    for value, name in (
        (SAMPLES["messages"] | SAMPLES["question-answer"], "messages"),
        (SAMPLES["text"] | SAMPLES["input-output"], "text"),
        (SAMPLES["alpaca"] | {"response": "c"}, "alpaca"),
        (SAMPLES["instruction-response"] | {"input": "c"}, "instruction-response"),
        (SAMPLES["input-output"], "input-output"),
    ):
        assert format_of([Record("file, line 1", value)]).name == name
    assert format_of([Record("file, line 1", SAMPLES["alpaca"])], "input-output").name == "input-output"
