"""Records of text, JSON, CSV and Parquet files and folders of them, read and checked before anything is loaded.

JSON is read by Python's json, so that a record is what was written. The readers of `datasets` and pandas turn a text
that looks like a date into a date, fill what a record lacks with nulls, unpack what looks like an archive, and do not
know the line of an error. Parquet is read by pyarrow, whose rows are plain values: no feature of a data set, such as an
image that is named by its address, is decoded or fetched. Neither writes a cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_fx.app.data.csv_rows import csv_rows
from dora_fx.files import (
    UnreadableFileError,
    UnsafeFileError,
    check_no_pointer,
    check_parquet_size,
    open_regular,
    parse_json,
    reading,
    reason_of,
    size_of,
)

_UNPACK = "unpack it"
_NUL = (
    "found a NUL character, which no text has; the file is binary, or UTF-16 without its mark; convert it, for "
    "example with: iconv -f UTF-16LE -t UTF-8"
)
# First bytes, kind and cure; UTF-32's mark begins with UTF-16's.
_OTHER_KINDS = (
    (b"\xff\xfe\0\0", "UTF-32", "convert it, for example with: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "convert it, for example with: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it, for example with: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"PK\x03\x04", "a zip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\0", "an xz file", _UNPACK),
    (b"PAR1", "a Parquet file", "give it the suffix .parquet"),
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_HELD_BACK = re.compile(r"(^|[-_.])(test|eval|validation|valid|val|dev)($|[-_.\d])", re.IGNORECASE)
_AGAIN = "write or download it again"
# Runs and dictionaries of Parquet spell long columns in few bytes, and compression adds its own; texts stay far below.
_MOST_BYTES_FOR_A_BYTE, _ALWAYS_ALLOWED = 200, 64 << 20
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Record:
    """One object of a data file.

    Attributes:
        where: its place for messages: the path, and the line, row or number in it.
        value: its fields.
        columns: what the file calls those fields that have another name here.
    """

    where: str
    value: dict[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """What the file calls a field."""
        return self.columns.get(name, name)


def read_records(path: Path) -> list[Record]:
    """The records of a file, or of the files of a folder in the order of their names.

    A .txt file is one record with a field `text`. A .json file has a list of objects, one object, or an object on each
    line, as a .jsonl file has. A .csv file has the names of its columns on the first line, and all values of it are
    texts. Fields of Parquet rows that are null are left out, at any depth.

    Raises:
        ValueError: a file is missing, of another kind, not UTF-8 or damaged, or holds no record or something else than
            objects; the message has the path and, where there is one, the line.
    """
    return [record for file in data_files(path) for record in _records_of(file)]


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder; those of folders inside it are not looked at.

    Raises:
        ValueError: there is none, a file has another suffix, or files of a folder are meant for tests, by their names,
            while others are not.
    """
    try:
        if not path.is_dir():
            _reader_of(path)
            return [path]
        found = sorted(file for file in path.iterdir() if file.suffix in _READERS and not file.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error
    if not found:
        raise ValueError(f"{path}: found no data file in the folder, expected some of {_NAMES_OF_SUFFIXES}")
    held_back = [file for file in found if _HELD_BACK.search(file.stem)]
    if held_back and len(held_back) < len(found):
        raise ValueError(
            f"{path}: found {held_back[0].name}, which is not for training by its name, beside "
            f"{next(file for file in found if file not in held_back).name}; give one file, or a folder without it"
        )
    return found


def check_text(where: str, text: str) -> str:
    """Return a text of a record; raises ValueError for characters that no text has."""
    if "\0" in text:
        raise ValueError(f"{where}: {_NUL}")
    if surrogate := _LONE_SURROGATE.search(text):
        raise ValueError(
            f"{where}: found {ascii(surrogate[0])[1:-1]} by itself, half of a character; "
            "write both halves, or the character itself"
        )
    return text


def _records_of(path: Path) -> list[Record]:
    found = list(_reader_of(path)(path))
    if not found:
        raise ValueError(f"{path}: the file has no text")
    return found


def _reader_of(path: Path) -> Callable[[Path], Iterator[Record]]:
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: found a {path.suffix or 'suffixless'} file, expected {_NAMES_OF_SUFFIXES}")
    return _READERS[path.suffix]


def _text_of_file(path: Path) -> str:
    try:
        with open_regular(path, follow_link=True) as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error
    check_no_pointer(path, data)
    for start, kind, cure in _OTHER_KINDS:
        if data.startswith(start):
            raise ValueError(f"{path}: found {kind}, expected text in UTF-8; {cure}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 at byte {error.start}; convert the file to UTF-8, for example with iconv"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: {_NUL}")
    return text


def _plain_text(path: Path) -> Iterator[Record]:
    text = _text_of_file(path)
    if text.strip():
        yield Record(str(path), {"text": text})


def _json_lines(path: Path) -> Iterator[Record]:
    return _records_of_lines(path, _text_of_file(path))


def _records_of_lines(path: Path, text: str) -> Iterator[Record]:
    # Not splitlines(), which also splits at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = parse_json(line, where)
            except UnsafeFileError as error:
                raise ValueError(f"{error}; expected an object on each line") from error
            yield _record(where, value)


def _json(path: Path) -> Iterator[Record]:
    text = _text_of_file(path)
    # Many files of lines have the suffix .json: their first line is an object by itself.
    lines = text.strip().split("\n", 1)
    if len(lines) == 2 and lines[0].startswith("{") and lines[0].rstrip().endswith("}"):
        yield from _records_of_lines(path, text)
    elif text.strip():
        value = parse_json(text, str(path))
        for number, element in enumerate(value if isinstance(value, list) else [value], start=1):
            yield _record(f"{path}, record {number}", element)


def _csv(path: Path) -> Iterator[Record]:
    for line, value in csv_rows(path, _text_of_file(path)):
        yield Record(f"{path}, line {line}", value)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        with open_regular(path, follow_link=True) as file:
            start, size = file.read(256), size_of(file)
            if not start:
                raise UnreadableFileError(f"{path}: the file is empty; {_AGAIN}")
            check_no_pointer(path, start)
            with reading(path, _AGAIN):
                at_most = max(_ALWAYS_ALLOWED, _MOST_BYTES_FOR_A_BYTE * size)
                metadata = pyarrow.parquet.ParquetFile(file).metadata
                check_parquet_size(path, file, metadata, at_most)
                # A text that stands in the file once is kept once, until it is known how often it stands for itself.
                texts = [name for name in map(_text_column, metadata.schema) if name]
                yield from _rows(path, pyarrow.parquet.ParquetFile(file, read_dictionary=texts), at_most)
    except OSError as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error


def _text_column(column: Any) -> str | None:
    """The path of a column that pyarrow can read as a dictionary and the places in it."""
    is_text = column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "NONE", "JSON", "ENUM")
    return column.path if is_text else None


def _rows(path: Path, parquet: Any, at_most: int) -> Iterator[Record]:
    number = taken = 0
    for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE):
        taken += sum(map(_bytes_of, batch.columns))
        if taken > at_most:
            raise UnsafeFileError(
                f"{path}: found more than {at_most:,} bytes of rows in it, expected fewer by its size"
            )
        for value in batch.to_pylist():
            number += 1
            yield Record(f"{path}, row {number}", _without_nulls(value))


def _bytes_of(column: Any) -> int:
    """Bytes of an Arrow array's values, each text counted as often as it stands there."""
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(column.dictionary)
        return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(map(_bytes_of, column.flatten()))
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_map(kind)
    return _bytes_of(column.flatten()) if is_list else column.nbytes


def _without_nulls(value: Any) -> Any:
    """Leave out fields that are null: Parquet gives every record the fields of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(element) for element in value] if isinstance(value, list) else value


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a {type(value).__name__}, expected an object with fields such as text")
    return Record(where, value)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _plain_text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)
_NAMES_OF_SUFFIXES = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
