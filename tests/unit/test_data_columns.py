"""CSV files, and `--columns`: fields of a format under the names that a file has for them."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

from dora_fx.app.data.formats import Completion, Conversation
from dora_fx.app.data.records import read_records
from dora_fx.app.data.training_data import read_data
from dora_fx.app.errors import UserError
from tests.sample_files import write


def test_csv_is_read_as_it_is_written(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b", "completion": 'say "x"'}, {"prompt": "two\nlines", "completion": ""}]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
        file.write("\r\n001,null\r\n")
    records = read_records(path)
    assert [record.value for record in records] == [*rows, {"prompt": "001", "completion": "null"}]
    assert [record.where for record in records] == [f"{path}, line {line}" for line in (2, 3, 6)]
    path.write_bytes(b",text\n0,a\n")
    assert [record.value for record in read_records(path)] == [{"column 1": "0", "text": "a"}]
    path.write_text("text\n" + "x" * 1_000_000)
    limit = csv.field_size_limit()
    assert len(read_records(path)[0].value["text"]) == 1_000_000 and csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has no text"),
        (b"prompt,completion\n", "the file has no text"),
        (b"a,b\n1,2\n3\n", "line 3: found 1 fields, expected 2, the columns of the first line; a field with a comma"),
        (b'a,b\n"1\n",2\n3,4,5\n', "line 4: found 3 fields, expected 2"),
        (b"a,b,a\n1,2,3\n", "line 1: found two columns 'a', expected a name of each"),
        (b'a,b\n1,2\n"x,3\n4,5\n', r"line 3: cannot be read \(unexpected end of data\); expected fields with commas"),
        (b'a,b\n"x"y,3\n', "line 2: cannot be read"),
        (b"prompt;completion\na;b\n", "line 1: found semicolons between the names of columns, expected commas"),
        (b"prompt\tcompletion\na\tb\n", "line 1: found tabs between the names"),
        (b"text\n" + b"x" * ((16 << 20) + 1), r"line 2: cannot be read \(field larger than field limit"),
        (b"text\ncaf\xe9\n", "line 2: not UTF-8 at byte 8; convert the file to UTF-8"),
        (b"text\na\0b\n", "line 2: found a NUL character"),
        (b"PK\x03\x04...", "found a zip file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_csv_that_is_none_is_named_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}") as raised:
        read_records(path)
    assert "\n" not in str(raised.value)


def test_a_csv_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="found a named pipe, expected a regular file"):
        read_records(tmp_path / "a.csv")


def test_columns_are_fields_under_the_names_that_a_file_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"Question": "a", "prompt": "x", "reply": "b", "messages": []}] * 2)
    found = read_data(path, "auto", {"prompt": "Question", "completion": "reply"})
    assert found.samples == [Completion(f"{path}, line {line}", "a", "b") for line in (1, 2)]
    assert found.format.name == "prompt-completion" and found.unused == ["prompt", "messages"]
    # A field without a column has its own name, and two may change places.
    assert read_data(path, "auto", {"completion": "reply"}).samples[0] == Completion(f"{path}, line 1", "x", "b")
    swapped = read_data(path, "auto", {"prompt": "reply", "completion": "prompt"})
    assert swapped.samples[0] == Completion(f"{path}, line 1", "b", "x") and swapped.unused == ["Question", "messages"]
    conversation = read_data(path, "question-answer", {"question": "Question", "answer": "reply"}).samples[0]
    assert isinstance(conversation, Conversation) and conversation.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        ({"promt": "q"}, "auto", "--columns: found 'promt' in front of =, .*text, messages.*; did you mean prompt"),
        ({"prompt": "q", "answer": "a"}, "auto", "--columns: found the fields prompt, answer, which no format h"),
        (
            {"question": "q"},
            "alpaca",
            "--columns: found 'question' in front of =, expected a field of the form",
        ),
        (
            {"prompt": "nowhere"},
            "auto",
            "--columns prompt=nowhere: found no column 'nowhere' in .*, expected one o",
        ),
        ({"prompt": "q"}, "auto", "line 1: found the fields 'q', 'a', 'n', expected those of"),
        ({"prompt": "q", "completion": "n"}, "auto", "line 1: found 3 in the field n, expected a string"),
        ({"prompt": "q", "completion": "a"}, "auto", "line 2: found nothing in the field a, expected some text"),
        (
            {"prompt": "q", "completion": "z"},
            "auto",
            "line 1: found the fields 'q', 'a', 'n', expected those of",
        ),
    ],
)
def test_columns_that_cannot_be_meant_are_named(
    columns: dict[str, str], name: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "b", "a": "c", "n": 3}, {"q": "b", "a": "", "n": 3, "z": "d"}])
    with pytest.raises(UserError, match=message):
        read_data(path, name, columns)
