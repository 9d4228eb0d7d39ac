"""Rows of CSV files by the names of their columns, each with its line.

Python's csv reads them, strictly: without that, a quote that is closed too early or never goes on as text, and what
follows lands in another field.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from dora_fx.files import shortened

# A quote that is never closed would take the rest of the file for one field.
_LONGEST_FIELD = 16 << 20
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line on which each row of a file starts, and the row; empty lines are none.

    Args:
        path: for messages.
        text: of the file: names of columns on the first line, commas between, double quotes around what has commas,
            quotes or line breaks in it.

    Raises:
        ValueError: a column has the name of another, a row has more or fewer fields than there are columns, a field is
            longer than 16 MiB, or quotes are not closed where they should be; the message has the line.
    """
    rows = _rows(path, text)
    names = _names(path, *next(rows, (1, [])))
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}, line {line}: found {len(row)} fields, expected {len(names)}, the columns of the first line; "
                "a field with a comma or a line break in it stands in double quotes"
            )
        yield line, dict(zip(names, row, strict=True))


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        # The limit is the whole process's.
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: cannot be read ({error}); expected fields with commas between, and double "
                "quotes around those that have commas, quotes or line breaks in them"
            ) from error
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        if row:
            yield line, row


def _names(path: Path, line: int, row: list[str]) -> list[str]:
    """Names of the columns; one without a name, as pandas writes its index, gets its number."""
    if len(row) == 1:
        for separator, called in _OTHER_SEPARATORS.items():
            if separator in row[0]:
                raise ValueError(
                    f"{path}, line {line}: found {called} between the names of columns, expected commas; "
                    "save the file with commas between"
                )
    names = [name.strip() or f"column {number}" for number, name in enumerate(row, start=1)]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{path}, line {line}: found two columns {shortened(name)}, expected a name of each")
    return names
