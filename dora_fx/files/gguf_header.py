"""Checks the header of a GGUF file before the libraries that read it allocate what the header says.

"GGUF"  version u32  number of tensors u64  number of values u64
per value     key (length u64, bytes)   type u32   a number, a string, or: type u32, length u64, elements
per tensor    name (length u64, bytes)  dimensions u32, u64 each   type u32   offset u64
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from dora_fx.files.model_sizes import check_elements, check_sizes
from dora_fx.files.regular_file import UnsafeFileError, open_regular

# Version 1 has counts and lengths of 32 bits.
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Far above what models have; the readers keep an object of some hundred bytes for every element of an array.
_MOST_VALUES, _MOST_TENSORS, _MOST_ELEMENTS, _MOST_DIMENSIONS = 1 << 16, 1 << 18, 1 << 24, 8

# Ends of the keys from whose values transformers builds modules and tables.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
}


def check_gguf_file(path: Path) -> None:
    """Compare all counts and lengths of the header with the size of the file.

    Raises:
        UnsafeFileError: a count or a length is larger than the file can hold, or the file is not a GGUF file.
        ValueError: the file is empty.
        OSError: it cannot be read.
    """
    with open_regular(path, follow_link=True) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data, path).check()


class _Walk:
    """A position in the header of one file, which moves forward and stays within the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0
        self._elements_left = _MOST_ELEMENTS
        self._sizes: dict[str, int] = {}

    def check(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise UnsafeFileError(
                f"{self._path}: found another kind of file, expected a GGUF file, which begins with GGUF"
            )
        version = self._number("I")
        if version not in _VERSIONS:
            raise UnsafeFileError(f"{self._path}: found version {version} of GGUF, expected 2 or 3, little-endian")
        num_tensors, num_values = self._number("Q"), self._number("Q")
        self._at_most("tensors", num_tensors, _MOST_TENSORS)
        self._at_most("values", num_values, _MOST_VALUES)
        for _ in range(num_values):
            self._value()
        elements = sum(self._tensor() for _ in range(num_tensors))
        check_elements(self._path, elements, len(self._data))
        check_sizes(self._path, self._sizes, elements)

    def _value(self) -> None:
        key = self._string()
        kind = self._number("I")
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            self._array(key)
        else:
            number = self._number(self._code(key, kind))
            name = _SIZES.get(key.rpartition(b".")[2].decode("utf-8", "replace"))
            if name is not None:
                # Several keys may have the same end; a reader uses the one of its architecture, so the largest counts.
                self._sizes[name] = max(number, self._sizes.get(name, number))

    def _array(self, key: bytes) -> None:
        kind, count = self._number("I"), self._number("Q")
        self._at_most(f"elements of {_shown(key)} and the arrays before it", count, self._elements_left)
        self._elements_left -= count
        if kind == _STRING:
            for _ in range(count):
                self._string()
        else:
            self._bytes(count * struct.calcsize(self._code(key, kind)))

    def _tensor(self) -> int:
        """Read the next tensor's entry; return its number of elements."""
        name, num_dimensions = self._string(), self._number("I")
        self._at_most(f"dimensions of {_shown(name)}", num_dimensions, _MOST_DIMENSIONS)
        dimensions = [self._number("Q") for _ in range(num_dimensions)]
        self._number("I")
        self._at_most(f"as the offset of {_shown(name)}", self._number("Q"), len(self._data))
        return math.prod(dimensions)

    def _code(self, key: bytes, kind: int) -> str:
        if kind not in _NUMBERS:
            raise UnsafeFileError(
                f"{self._path}: found a value of type {kind} as {_shown(key)}, expected one of GGUF's"
            )
        return _NUMBERS[kind]

    def _number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _bytes(self, count: int) -> bytes:
        left = len(self._data) - self._at
        if count > left:
            raise UnsafeFileError(
                f"{self._path}: found a header with {count:,} more bytes at {self._at:,}, expected at most the "
                f"{left:,} that are left"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _at_most(self, what: str, found: int, most: int) -> None:
        if found > most:
            raise UnsafeFileError(f"{self._path}: found {found:,} {what}, expected at most {most:,}")


def _shown(name: bytes) -> str:
    return repr(name[:60].decode("utf-8", "replace"))
