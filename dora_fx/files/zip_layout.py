"""Checks that all readers of zip files read the same records from an archive.

Readers disagree about a file that contradicts itself. Python's zipfile uses the zip64 record that lies before its
locator; miniz, torch's reader, uses the one that the locator points to. One reads entries until the directory's bytes
end, another reads the number of entries that is stated; one shifts all offsets by data in front of the archive. So
whatever the format states twice must agree here, and every byte of the file must belong to exactly one part:

    record, record, ...    header (30 bytes, name, extra), data, and a descriptor where the header has no sizes
    central directory      an entry per record (46 bytes, name, extra)
    zip64 record, locator  (56 and 20 bytes) or neither
    end record             (22 bytes)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from dora_fx.files.message_text import shortened
from dora_fx.files.regular_file import UnsafeFileError

_HEADER, _ENTRY = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L")
_RECORD64, _LOCATOR, _END = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL"), struct.Struct("<4s4H2LH")
_DESCRIPTORS = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))
_STORED, _HAS_DESCRIPTOR, _UTF8 = 0, 1 << 3, 1 << 11
_MOST16, _MOST32 = (1 << 16) - 1, (1 << 32) - 1
_ZIP64_FIELD = 1


@dataclass(frozen=True)
class ZipRecord:
    """A file in an archive: offsets of its header and its data, and the size of its data in bytes."""

    name: str
    header: int
    data: int
    size: int


@dataclass(frozen=True)
class _Entry:
    """A record's entry in the central directory."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int


def zip_records(file: BinaryIO, size: int) -> Mapping[str, ZipRecord]:
    """Return the records of an archive by their names in lower case; torch ignores case when it looks one up.

    Args:
        file: the archive.
        size: of the whole file in bytes.

    Raises:
        UnsafeFileError: two readers could read it differently, or its records are compressed. The message does not name
            the file; callers add the name.
    """
    directory, end, count = _directory(file, size)
    entries = sorted(_entries(_read(file, directory, end - directory)), key=lambda entry: entry.header)
    if len(entries) != count:
        raise _differs(f"a directory of {len(entries):,} entries, expected {count:,} by the end record")
    records: dict[str, ZipRecord] = {}
    at = 0
    for entry in entries:
        if entry.header != at:
            raise _differs(f"a record at byte {entry.header:,}, expected the next at {at:,}")
        record, at = _record(file, entry)
        if record.name.lower() in records:
            raise _differs(f"two records named {shortened(record.name)}, expected one")
        records[record.name.lower()] = record
    if at != directory:
        raise _differs(f"records that end at byte {at:,}, expected the directory there and not at {directory:,}")
    return records


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return the offsets of the central directory's beginning and end, and its stated number of entries."""
    at = size - _END.size
    signature, *disks, on_disk, total, length, begin, comment = _END.unpack(_read(file, at, _END.size))
    if signature != b"PK\5\6" or comment:
        raise UnsafeFileError("found no archive of torch.save (its last 22 bytes are not an end record)")
    fields = (on_disk, total, length, begin)
    if any(disks):
        raise _differs("an archive of several parts, expected one")
    locator = at - _LOCATOR.size
    if locator >= 0 and _read(file, locator, 4) == b"PK\6\7":
        at = locator - _RECORD64.size
        fields = _zip64_fields(file, locator, at, fields)
    on_disk, total, length, begin = fields
    if on_disk != total or begin + length != at:
        raise _differs(f"a directory of {length:,} bytes at {begin:,}, expected it to end at {at:,}")
    return begin, at, total


def _zip64_fields(file: BinaryIO, locator: int, at: int, fields: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the zip64 record's counts, size and offset; the end record must repeat them, capped at its field sizes."""
    _, disk, pointed, disks = _LOCATOR.unpack(_read(file, locator, _LOCATOR.size))
    if (disk, pointed, disks) != (0, at, 1):
        raise _differs(f"a locator that points to byte {pointed:,}, expected the zip64 record before it, at {at:,}")
    signature, length, _, _, disk, start, *wide = _RECORD64.unpack(_read(file, at, _RECORD64.size))
    if (signature, length, disk, start) != (b"PK\6\6", _RECORD64.size - 12, 0, 0):
        raise _differs("no zip64 record before its locator, expected one of 56 bytes")
    if fields != tuple(map(min, wide, (_MOST16, _MOST16, _MOST32, _MOST32))):
        raise _differs("an end record and a zip64 record that differ")
    return wide[0], wide[1], wide[2], wide[3]


def _entries(directory: bytes) -> list[_Entry]:
    entries, at = [], 0
    while at < len(directory):
        if len(directory) - at < _ENTRY.size:
            raise _differs("a directory that is cut")
        fields = _ENTRY.unpack_from(directory, at)
        name, extra = fields[10], fields[11]
        end = at + _ENTRY.size + name + extra
        if fields[0] != b"PK\1\2" or end > len(directory):
            raise _differs("a directory that is cut, or whose entries do not fit its size")
        name = directory[at + _ENTRY.size : end - extra]
        entries.append(_entry(fields, name, directory[end - extra : end]))
        at = end
    return entries


def _entry(fields: tuple[int, ...], name: bytes, extra: bytes) -> _Entry:
    _, _, _, flags, method, _, _, crc, compressed, size, _, _, comment, disk, _, _, header = fields
    # Some readers end a name at a NUL, and readers decode bytes beyond ASCII in different ways.
    if not name or not name.isascii() or not name.decode("ascii").isprintable() or b"\\" in name:
        raise _differs(f"a record named {shortened(name.decode('latin-1'))}, expected letters and digits")
    if method != _STORED:
        raise UnsafeFileError("found compressed records, expected them as torch.save writes them")
    if flags & ~(_HAS_DESCRIPTOR | _UTF8) or comment or disk:
        raise _differs("a record that is encrypted, has a comment or is in another part")
    # The extra field holds those fields that need more than 32 bits, in this order, and nothing else.
    wide = [value == _MOST32 for value in (size, compressed, header)]
    if any(wide) or extra:
        expected = struct.pack("<2H", _ZIP64_FIELD, 8 * sum(wide))
        if not any(wide) or len(extra) != 4 + 8 * sum(wide) or not extra.startswith(expected):
            raise _differs("a record with other extra fields than sizes in 64 bits")
        values = iter(struct.unpack(f"<{sum(wide)}Q", extra[4:]))
        size, compressed, header = (
            next(values) if is_wide else value for is_wide, value in zip(wide, (size, compressed, header), strict=True)
        )
    if compressed != size:
        raise UnsafeFileError("found compressed records, expected them as torch.save writes them")
    return _Entry(name, flags, crc, size, header)


def _record(file: BinaryIO, entry: _Entry) -> tuple[ZipRecord, int]:
    """Check a record's header against the directory; return the record and the offset behind it."""
    header = _HEADER.unpack(_read(file, entry.header, _HEADER.size))
    signature, _, flags, method, _, _, crc, compressed, size, name, extra = header
    data = entry.header + _HEADER.size + name + extra
    end = data + entry.size
    shown = shortened(entry.name.decode("ascii"))
    if signature != b"PK\3\4" or _read(file, entry.header + _HEADER.size, name) != entry.name:
        raise _differs(f"a header without the name {shown}, expected the directory's name")
    sizes = {(entry.crc, min(entry.size, _MOST32), min(entry.size, _MOST32))}
    if flags & _HAS_DESCRIPTOR:
        sizes.add((0, 0, 0))
    if flags != entry.flags or method != _STORED or (crc, compressed, size) not in sizes:
        raise _differs(f"a header of {shown} that contradicts the directory")
    if flags & _HAS_DESCRIPTOR:
        end += _descriptor_size(file, entry, end, shown)
    return ZipRecord(entry.name.decode("ascii"), entry.header, data, entry.size), end


def _descriptor_size(file: BinaryIO, entry: _Entry, at: int, shown: str) -> int:
    for descriptor in _DESCRIPTORS:
        expected = (b"PK\7\x08", entry.crc, entry.size, entry.size)
        if entry.size <= _MOST32 or descriptor is _DESCRIPTORS[1]:
            found = _read(file, at, descriptor.size)
            # For an entry without data both formats match, so the signature behind the descriptor decides.
            if descriptor.unpack(found) == expected and _read(file, at + descriptor.size, 2) == b"PK":
                return descriptor.size
    raise _differs(f"no descriptor behind {shown} with the directory's sizes")


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    """Read exactly that many bytes; raise UnsafeFileError if the file has fewer."""
    if at >= 0 and count >= 0:
        file.seek(at)
        data = file.read(count)
        if len(data) == count:
            return data
    raise UnsafeFileError("found no archive of torch.save (it is cut)")


def _differs(found: str) -> UnsafeFileError:
    return UnsafeFileError(f"found an archive that torch.save did not write ({found})")
