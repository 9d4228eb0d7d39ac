"""`--columns`: fields of a format under the names that a file has for them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_fx.app.data.formats import FORMATS
from dora_fx.app.data.records import Record
from dora_fx.app.errors import UserError
from dora_fx.files import shortened


def check_columns(columns: Mapping[str, str], format_name: str | None) -> None:
    """Check that a format has all the fields that columns are named for; `format_name` is the one that is meant.

    Raises:
        UserError: no format, or not that one, has them.
    """
    meant = list(FORMATS.values()) if format_name is None else [FORMATS[format_name]]
    names = list(dict.fromkeys(name for each in meant for name in (*each.fields, *sorted(each.names))))
    for name in columns:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            of_what = "a format" if format_name is None else f"the format {format_name}"
            raise UserError(
                f"--columns: found {shortened(name)} in front of =, expected a field of {of_what}: "
                f"{', '.join(names)}{hint}"
            )
    if not any(each.names >= columns.keys() for each in meant):
        raise UserError(
            f"--columns: found the fields {', '.join(columns)}, which no format has together; there are "
            f"{', '.join(map(str, meant))}"
        )


def rename(path: Path, records: Sequence[Record], columns: Mapping[str, str]) -> tuple[list[Record], list[str]]:
    """Records with the fields that columns are named for, and the names of what is no longer seen for it.

    Where a record has a field of its own under such a name, the column that the user names counts.

    Raises:
        UserError: no record has one of the columns.
    """
    if not columns:
        return list(records), []
    there = dict.fromkeys(name for record in records for name in record.value)
    for name, column in columns.items():
        if column not in there:
            raise UserError(
                f"--columns {name}={column}: found no column {shortened(column)} in {path}, expected one of "
                f"{', '.join(map(shortened, list(there)[:12]))}"
            )
    taken = {*columns, *columns.values()}
    renamed = [
        Record(
            record.where,
            {name: record.value[column] for name, column in columns.items() if column in record.value}
            | {name: value for name, value in record.value.items() if name not in taken},
            columns,
        )
        for record in records
    ]
    return renamed, [name for name in there if name in columns and name not in columns.values()]
