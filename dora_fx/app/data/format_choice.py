"""Finds the format of a file's records by the names of their fields, and explains when none fits."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from dora_fx.app.data.formats import FORMATS, DataFormat
from dora_fx.app.data.records import Record
from dora_fx.files import shortened

_ALIKE = 0.75


def format_of(records: Sequence[Record], name: str | None = None, columns: Collection[str] = ()) -> DataFormat:
    """The format of records: the one that is named, or the only one whose fields the first record has.

    Args:
        records: of one file or folder.
        name: of the format, where the user named it.
        columns: fields that the user named columns for; a format that does not use them is not meant.

    Raises:
        ValueError: no format has the fields, or several, or a record lacks those of the first; the message has the
            fields that were found and the nearest format.
    """
    first = records[0]
    meant = [each for each in FORMATS.values() if each.names >= set(columns)] if name is None else [FORMATS[name]]
    fitting = _fitting(first, meant) if name is None else meant
    if not fitting:
        nearest = _nearest(first, meant)
        missing = " ".join(f"{field}=NAME" for field in nearest.fields if first.value.get(field) is None)
        raise ValueError(
            f"{first.where}: found {_fields(first)}, expected those of a format; the nearest is {nearest}; "
            f"give the names of its columns with --columns {missing}; there are {', '.join(map(str, meant))}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{first.where}: found {_fields(first)}, which are those of {' and of '.join(map(str, fitting))}; "
            f"say which with --data-format {' or '.join(each.name for each in fitting)}"
        )
    for record in records:
        if fitting[0] not in _fitting(record, meant):
            raise ValueError(_misfit(record, first, fitting[0], is_named=name is not None))
    return fitting[0]


def unused_fields(records: Sequence[Record], data_format: DataFormat) -> list[str]:
    """Names of fields that records have and the format does not use, in the order in which they come."""
    found: dict[str, None] = {}
    for record in records:
        used = data_format.used_in(record)
        found |= dict.fromkeys(name for name in record.value if name not in used)
    return list(found)


def _fitting(record: Record, formats: Sequence[DataFormat]) -> list[DataFormat]:
    """Those of the formats that a record may be of."""
    found = [each for each in formats if _has(record, each)]
    return [each for each in found if not each.gives_way] or found


def _has(record: Record, data_format: DataFormat) -> bool:
    return all(record.value.get(name) is not None for name in data_format.fields)


def _misfit(record: Record, first: Record, expected: DataFormat, is_named: bool) -> str:
    found = f"{record.where}: found {_fields(record)}, expected those of {expected}"
    if is_named or record is first:
        return f"{found}, which --data-format names"
    others = _fitting(record, list(FORMATS.values()))
    mixed = f"; it is of the format {others[0].name}, and a file or folder has one format" if others else ""
    return f"{found}, which {first.where} has{mixed}"


def _fields(record: Record) -> str:
    names = [shortened(record.column(name)) for name, value in record.value.items() if value is not None]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"the fields {shown}" if names else "no fields"


def _nearest(record: Record, formats: Sequence[DataFormat]) -> DataFormat:
    """The format whose names are most like the record's, or one for values like the record's where no name is."""

    def likeness(data_format: DataFormat) -> float:
        return sum(map(best_ratio, data_format.fields)) / len(data_format.fields)

    def best_ratio(name: str) -> float:
        close = difflib.get_close_matches(name, record.value, 1, _ALIKE)
        return difflib.SequenceMatcher(None, name, close[0]).ratio() if close else 0.0

    found = max(formats, key=likeness)
    if likeness(found) > 0 or len(formats) < len(FORMATS):
        return found
    if any(isinstance(value, list) for value in record.value.values()):
        return FORMATS["messages"]
    num_texts = sum(isinstance(value, str) for value in record.value.values())
    return FORMATS["prompt-completion" if num_texts > 1 else "text"]
