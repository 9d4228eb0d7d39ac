"""`--data`, read and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dora_fx.app.data.columns import check_columns, rename
from dora_fx.app.data.format_choice import format_of, unused_fields
from dora_fx.app.data.formats import FORMATS, DataFormat, Sample, Text
from dora_fx.app.data.records import read_records
from dora_fx.app.errors import UserError


@dataclass(frozen=True)
class TrainingData:
    """Samples of one format, and the fields of their records that nothing uses."""

    format: DataFormat
    samples: Sequence[Sample]
    unused: Sequence[str] = ()


def read_data(
    path: Path, format_name: str, columns: Mapping[str, str] | None = None, files: Sequence[Path] | None = None
) -> TrainingData:
    """The samples of a file or folder.

    Args:
        path: of the file or folder, or what the user named, for messages.
        format_name: `auto`, or the format that the user named.
        columns: what the data call fields of the format, by the format's names; others have their own.
        files: to read in place of the path.

    Raises:
        UserError: a file cannot be read, no format or several have its fields, or a record is not of the format; the
            message has the file and the line. Or there is no such field or column.
    """
    columns = columns or {}
    named = None if format_name == "auto" else format_name
    check_columns(columns, named)
    try:
        records, hidden = rename(path, [each for file in files or [path] for each in read_records(file)], columns)
        found = format_of(records, named, columns)
        samples = [found.sample(record) for record in records]
    except ValueError as error:
        raise UserError(f"--data {error}") from error
    samples = [sample for sample in samples if not isinstance(sample, Text) or sample.text.strip()]
    if not samples:
        raise UserError(f"--data {path}: the file has no text")
    return TrainingData(found, samples, [*hidden, *unused_fields(records, found)])


def demo_data(name: Literal["pirate", "text"]) -> TrainingData:
    """The data of `--demo`: questions that a pirate answers, or Python's language reference, one text per topic."""
    if name == "pirate":
        return read_data(Path(__file__).with_name("pirate.jsonl"), "messages")
    from pydoc_data.topics import topics

    return TrainingData(FORMATS["text"], [Text(name, text) for name, text in topics.items()])
