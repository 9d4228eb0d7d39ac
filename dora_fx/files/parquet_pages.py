"""Adds up the unpacked sizes of a Parquet file's pages before a reader unpacks them.

A few kilobytes of pages can hold gigabytes, since compression, runs and nulls take next to no space. The sizes in the
footer may be false, and a reader allocates what the header of each page says. These headers are structs of Thrift's
compact protocol, one before each page:

    PageHeader   2: bytes unpacked   3: bytes in the file   5, 7, 8: the kind's own header, with 1: number of values
"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import Any

from dora_fx.files.regular_file import UnsafeFileError

_UNPACKED, _PACKED, _NUM_VALUES = 2, 3, 1
_HEADERS_WITH_VALUES = (5, 7, 8)
_DEEPEST, _LONGEST_VARINT = 8, 10
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

# Approximate bytes of a row and of a value as Python objects.
_ROW, _VALUE = 256, 16


def check_parquet_size(path: Path, file: BufferedReader, metadata: Any, at_most: int) -> None:
    """Check that all rows together take no more than `at_most` bytes in memory.

    Args:
        path: of the file, for messages.
        file: the open file.
        metadata: pyarrow's metadata of the file.
        at_most: limit in bytes.

    Raises:
        UnsafeFileError: the rows take more, or the pages are not where the metadata says.
    """
    needed = metadata.num_rows * _ROW
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            # No further pages are read once the limit is passed.
            if needed <= at_most:
                chunk = metadata.row_group(group).column(index)
                start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0)
                # Values of a fixed length can repeat one entry of a dictionary, and each becomes an object of that
                # length.
                width = max(_VALUE, metadata.schema.column(index).length)
                needed += _Pages(path, file, start, start + chunk.total_compressed_size).size(width)
    if needed > at_most:
        raise UnsafeFileError(
            f"{path}: found {metadata.num_rows:,} rows of more than {at_most:,} bytes in it, expected fewer by its size"
        )


class _Pages:
    """The pages of one column in a part of the file."""

    def __init__(self, path: Path, file: BufferedReader, start: int, end: int) -> None:
        self._path, self._file, self._at, self._end = path, file, start, end

    def size(self, width: int) -> int:
        """Return the bytes of all unpacked pages, plus `width` for each value."""
        total = 0
        while self._at < self._end:
            self._file.seek(self._at)
            header = self._struct(_DEEPEST)
            values = [header[kind].get(_NUM_VALUES) for kind in _HEADERS_WITH_VALUES if kind in header]
            counts = [header.get(_UNPACKED), header.get(_PACKED), *values]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise self._damaged()
            total += counts[0] + width * sum(values)
            self._at = self._file.tell() + counts[1]
        return total

    def _struct(self, depth: int) -> dict[int, Any]:
        """Read a struct; return its fields by number. Fields that are neither integers nor structs are skipped."""
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            fields[number] = self._value(byte & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth == 0:
            raise self._damaged()
        if kind in (_TRUE, _FALSE):
            return None
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _STRUCT:
            return self._struct(depth - 1)
        if kind in (_LIST, _SET):
            byte = self._byte()
            for _ in range(self._varint() if byte >> 4 == 15 else byte >> 4):
                self._value(_BYTE if byte & 15 in (_TRUE, _FALSE) else byte & 15, depth - 1)
            return None
        skipped = {_BYTE: 1, _DOUBLE: 8}.get(kind) or (self._varint() if kind == _BINARY else None)
        if skipped is None or self._file.tell() + skipped > self._end:
            raise self._damaged()
        self._file.seek(skipped, 1)
        return None

    def _integer(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)

    def _varint(self) -> int:
        number = 0
        for shift in range(_LONGEST_VARINT):
            byte = self._byte()
            number |= (byte & 127) << (7 * shift)
            if byte < 128:
                return number
        raise self._damaged()

    def _byte(self) -> int:
        data = self._file.read(1) if self._file.tell() < self._end else b""
        if not data:
            raise self._damaged()
        return data[0]

    def _damaged(self) -> UnsafeFileError:
        return UnsafeFileError(f"{self._path}: cannot be read (found no page at byte {self._at:,})")
