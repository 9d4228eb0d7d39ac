"""Parquet files of kilobytes that become gigabytes are refused before their rows are unpacked.

Beside each stands pyarrow, which unpacks them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dora_fx.app.data.records import read_records
from tests.tables import every_case
from tests.unit.hostile_files import is_endless

# pyarrow imports pandas with the first rows, where it is installed, which waits for ever where it finds no memory.
ROWS = (
    "import sys, pyarrow.parquet\npyarrow.table({'a': [1]}).to_pylist()\npass\n"
    "pyarrow.parquet.read_table(sys.argv[1]).to_pylist()"
)
READ = (
    "import sys, pyarrow.compute, pyarrow.parquet\nfrom pathlib import Path\n"
    "from dora_fx.app.data.records import read_records\npass\nread_records(Path(sys.argv[1]))"
)
MANY = "a" * (100 << 20)


def nulls() -> pa.Table:
    return pa.table({"text": pa.nulls(3_000_000)})


def long_text() -> pa.Table:
    return pa.table({"text": [MANY]})


def lists_of_nulls() -> pa.Table:
    return pa.table({"text": ["a"] * 100, "more": pa.array([[None] * 100_000] * 100, pa.list_(pa.null()))})


def texts_in_one_row() -> pa.Table:
    """One text, which a list has two thousand times."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["a" * 1000_000]))
    messages = pa.ListArray.from_arrays([0, 2000], pa.StructArray.from_arrays([texts], ["content"]))
    return pa.table({"text": ["a"], "messages": messages})


def zigzag(number: int, length: int) -> bytes:
    """An integer of Thrift's compact protocol, in so many bytes."""
    number *= 2
    return bytes([number >> 7 * at & 127 | 128 * (at < length - 1) for at in range(length)])


def with_a_false_footer(path: Path) -> None:
    """The footer says that a hundred kilobytes are unpacked."""
    data = path.read_bytes()
    true = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    head, footer = data[: len(data) // 2], data[len(data) // 2 :]
    assert footer.count(zigzag(true, 5 - (true < 1 << 27))) >= 1
    path.write_bytes(head + footer.replace(zigzag(true, 4), zigzag(100, 4)))
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 100


TABLES: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "nulls": (nulls, "found 3,000,000 rows of more than 67,108,864 bytes in it"),
    "long": (long_text, "found 1 rows of more than 67,108,864 bytes in it"),
    "false": (long_text, "found 1 rows of more than 67,108,864 bytes in it"),
    "lists": (lists_of_nulls, "found 100 rows of more than 67,108,864 bytes in it"),
    "messages": (texts_in_one_row, "found more than 67,108,864 bytes of rows in it"),
}


@every_case("name", TABLES)
def test_rows_of_few_bytes(name: str, tmp_path: Path) -> None:
    make, message = TABLES[name]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(make(), path, compression="zstd")
    if name == "false":
        with_a_false_footer(path)
    assert path.stat().st_size < 20_000
    assert is_endless(ROWS, path, mebibytes=60, seconds=10)
    with pytest.raises(ValueError, match=rf"^{path}: {message}, expected fewer by its size; write or download it"):
        read_records(path)
    assert not is_endless(READ, path, mebibytes=60, seconds=10)


def test_a_column_that_is_read_by_its_dictionary(tmp_path: Path) -> None:
    """What texts, numbers, lists and nulls are does not depend on how they are kept meanwhile."""
    rows = [
        {"text": "a", "messages": [{"role": "user", "content": "b"}, {"role": "user", "content": "a"}], "score": 1.5},
        {"text": "a", "messages": [], "bytes": b"c", "score": 2.0},
        {"text": "", "names": ["a", "a"], "bytes": b"c", "score": -1.0},
    ]
    names = {name for row in rows for name in row}
    table = pa.table({name: [row.get(name) for row in rows] for name in sorted(names)})
    for number, options in enumerate(
        ({}, {"use_dictionary": False}, {"compression": "zstd", "data_page_version": "2.0"})
    ):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(table, path, **options)
        assert [record.value for record in read_records(path)] == rows
