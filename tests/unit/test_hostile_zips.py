"""Archives that Python's zipfile and torch read differently, or that nobody could read alike, are refused.

What torch finds in them stands beside what zipfile finds.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_fx.files.regular_file import UnsafeFileError
from dora_fx.files.torch_file import check_torch_file, load_torch_bytes
from dora_fx.files.zip_layout import zip_records
from tests.tables import every_case
from tests.unit.hostile_files import is_endless, saved

END, LOCATOR, RECORD64 = 22, 20, 56
PLAIN, HIDDEN = {"shown": 1}, {"found": 2}


def torch_reads(archive: bytes) -> Any:
    return torch.load(io.BytesIO(archive), weights_only=True)


def zipfile_reads(archive: bytes) -> bytes:
    """The pickle that Python's reader finds."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read("archive/data.pkl")


class Parts:
    """The parts of an archive of torch.save, to be put together anew."""

    def __init__(self, value: Any) -> None:
        data = saved(value)
        self.total, self.length, self.begin = struct.unpack("<HLL", data[-END + 10 : -2])
        self.records, self.directory = data[: self.begin], data[self.begin :][: self.length]

    def moved(self, by: int) -> bytes:
        """The directory for records that begin so many bytes later."""
        entries, at = b"", 0
        while at < len(self.directory):
            name, extra = struct.unpack("<2H", self.directory[at + 28 : at + 32])
            end = at + 46 + name + extra
            header = struct.unpack("<L", self.directory[at + 42 : at + 46])[0] + by
            entries += self.directory[at : at + 42] + struct.pack("<L", header) + self.directory[at + 46 : end]
            at = end
        return entries

    def record64(self, begin: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 798, 45, 0, 0, self.total, self.total, self.length, begin)

    def end(self, begin: int) -> bytes:
        return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, self.total, self.total, self.length, begin, 0)


def locator(at: int) -> bytes:
    return struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)


def two_directories() -> bytes:
    """The zip64 record before the locator is one, and the locator points to another."""
    shown, hidden = Parts(PLAIN), Parts(HIDDEN)
    begin = len(shown.records) + len(hidden.records)
    data = shown.records + hidden.records + hidden.moved(len(shown.records))
    pointed = len(data)
    data += hidden.record64(begin)
    last = len(data)
    data += shown.directory + shown.record64(last) + locator(pointed) + shown.end(last)
    return data


def more_entries_than_counted() -> bytes:
    """miniz reads as many entries as are counted, and zipfile as many as there is room for; the last name wins."""
    shown, hidden = Parts(PLAIN), Parts(HIDDEN)
    directory = hidden.directory + shown.moved(len(hidden.records))
    data = hidden.records + shown.records
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *(hidden.total,) * 2, len(directory), len(data), 0)
    return data + directory + end


@pytest.mark.parametrize("plant", [two_directories, more_entries_than_counted])
def test_two_readers_find_two_pickles(plant: Callable[[], bytes], tmp_path: Path) -> None:
    planted = plant()
    assert torch_reads(planted) == HIDDEN
    assert b"shown" in zipfile_reads(planted) and b"found" not in zipfile_reads(planted)
    with pytest.raises(UnsafeFileError, match=r"^a: found an archive that torch.save did not write"):
        load_torch_bytes(planted, "a")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(planted)
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin: found an archive that torch.save did not write"):
        check_torch_file(path)


def edited(at: int, code: str, value: int, *, part: str = "directory") -> bytes:
    """A field of the first entry of the directory, of its record, or of the end of an archive, changed."""
    data = bytearray(saved({"a": torch.zeros(3)}))
    begin = struct.unpack("<L", data[-6:-2])[0]
    struct.pack_into(f"<{code}", data, {"directory": begin, "record": 0, "end": len(data) - END}[part] + at, value)
    return bytes(data)


def with_extra(extra: bytes) -> bytes:
    """The entry of the first record with something in its extra field, and everything else moved accordingly."""
    parts = Parts(PLAIN)
    (name,) = struct.unpack("<H", parts.directory[28:30])
    first = parts.directory[:30] + struct.pack("<H", len(extra)) + parts.directory[32 : 46 + name]
    parts.directory = first + extra + parts.directory[46 + name :]
    parts.length = len(parts.directory)
    return parts.records + parts.directory + parts.end(parts.begin)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "1")
    return buffer.getvalue()


def with_a_gap() -> bytes:
    parts = Parts(PLAIN)
    return parts.records + b"PK" + parts.directory + parts.end(parts.begin + 2)


UNICODE_PATH = struct.pack("<2HBL", 0x7075, 5 + len("archive/x"), 1, 0) + b"archive/x"
ARCHIVES = {
    "front": (lambda: b"PK\3\4" + saved({}), "points to byte"),
    "behind": (lambda: saved({}) + b"\0", "its last 22 bytes are not an end record"),
    "comment": (lambda: saved({})[:-2] + b"\4\0more", "its last 22 bytes are not an end record"),
    "gap": (with_a_gap, "expected the directory there"),
    "same name": (lambda: zipped("a/data.pkl", "a/DATA.pkl"), "two records named 'a/DATA.pkl'"),
    "folders": (lambda: zipped("a/data.pkl", "b/data.pkl"), "with 2 folders"),
    "NUL": (lambda: zipped("a/data.pkl", "a/data.plk").replace(b"data.plk", b"data.p\0k"), "a record named"),
    "backslash": (lambda: zipped("a/data.pkl", "a/b").replace(b"a/b", b"a\\b"), "a record named"),
    "unicode": (lambda: zipped("a/data.pkl", "a/\xfc"), "a record named"),
    "unicode path": (lambda: with_extra(UNICODE_PATH), "other extra fields than sizes in 64 bits"),
    "64 bits for nothing": (lambda: with_extra(struct.pack("<2HQ", 1, 8, 0)), "other extra fields than sizes"),
    "encrypted": (lambda: edited(8, "H", 0x809), "encrypted"),
    "compressed": (lambda: edited(10, "H", 8), "found compressed records"),
    "size": (lambda: edited(24, "L", 1), "found compressed records"),
    "header": (lambda: edited(42, "L", 7), "a record at byte"),
    "checksum": (lambda: edited(16, "L", 7), "no descriptor behind 'archive/data.pkl'"),
    "other part": (lambda: edited(34, "H", 1), "in another part"),
    "local name": (lambda: edited(30, "B", 65, part="record"), "a header without the name"),
    "local compression": (lambda: edited(8, "H", 8, part="record"), "contradicts the directory"),
    "local size": (lambda: edited(22, "L", 8, part="record"), "contradicts the directory"),
    "local extra": (lambda: edited(28, "H", 20, part="record"), "no descriptor behind"),
    "local signature": (lambda: edited(3, "B", 5, part="record"), "a header without the name"),
    "count": (lambda: edited(10, "H", 3, part="end"), "an end record and a zip64 record that differ"),
    "offset": (lambda: edited(16, "L", 3, part="end"), "an end record and a zip64 record that differ"),
    "several parts": (lambda: edited(4, "H", 1, part="end"), "an archive of several parts"),
    "no zip64 record": (lambda: edited(-LOCATOR - RECORD64, "B", 1, part="end"), "no zip64 record before its locator"),
    "longer zip64 record": (lambda: edited(-LOCATOR - RECORD64 + 4, "Q", 45, part="end"), "no zip64 record before"),
}  # fmt: skip


@every_case("name", ARCHIVES)
def test_what_lets_readers_differ(name: str) -> None:
    plant, message = ARCHIVES[name]
    with pytest.raises(UnsafeFileError, match=rf"^a: [^\n]*{message}"):
        load_torch_bytes(plant(), "a")


def test_an_alignment_that_torch_divides_by(tmp_path: Path) -> None:
    """On the meta device torch computes where storages lie, by a number of the archive."""
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(io.BytesIO(saved([torch.zeros(1), torch.ones(1)]))) as source:
        contents = {record.filename: source.read(record) for record in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in (contents | {"archive/.storage_alignment": b"0"}).items():
            target.writestr(name, content)
    assert is_endless("import sys, torch\npass\ntorch.load(sys.argv[1], 'meta', weights_only=True)", path)
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin: found '0' as \.storage_alignment, expected"):
        check_torch_file(path)


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    """Also with storages of more than 4 GiB, behind them, and with more records than 16 bits count."""
    path = tmp_path / "a model.bin"
    # Torch leaves holes in the place of the data, so that the file takes no room on the disk.
    with torch.serialization.skip_data():
        torch.save({"large": torch.empty(1 << 32, dtype=torch.int8), "none": torch.empty(0), "a": torch.zeros(5)}, path)
    check_torch_file(path)
    with path.open("rb") as file, zipfile.ZipFile(path) as opened:
        found = zip_records(file, path.stat().st_size)
        expected = {record.filename: (record.file_size, record.header_offset) for record in opened.infolist()}
    assert {record.name: (record.size, record.header) for record in found.values()} == expected
    assert max(size for size, _ in expected.values()) == 1 << 32 < max(header for _, header in expected.values())
    path.unlink()
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for number in range(66_000):
        writer.write_record(f"data/{number}", b"1", 1)
    writer.write_end_of_file()
    assert len(zip_records(buffer, len(buffer.getvalue()))) > 66_000
