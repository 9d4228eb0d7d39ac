"""Checks and reads files of `torch.save`: zip archives of one pickle and the bytes of its tensors.

`torch.load(weights_only=True)` allows a list of classes, but the list belongs to the process: Megatron adds NumPy's
constructors and others to it, and torch's own entries include callables that allocate as much as a number in the file
says. So the archive is checked first, as `torch_pickle.py` explains, in the same bytes that torch reads afterwards.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dora_fx.files.message_text import reason_of, shortened
from dora_fx.files.model_sizes import check_elements
from dora_fx.files.regular_file import UnsafeFileError, open_regular, size_of
from dora_fx.files.torch_pickle import TorchPickle
from dora_fx.files.zip_layout import ZipRecord, zip_records

# Small records that say how torch reads the others. torch divides by the alignment, so a zero would kill the process.
_SETTINGS = {"byteorder": (b"little", b"big"), ".storage_alignment": tuple(b"%d" % (1 << bits) for bits in range(21))}
_LONGEST_SETTING = 64


def load_torch_bytes(data: bytes, where: str) -> Any:
    """Load an archive of `torch.save` onto the CPU: numbers, text, bytes, tensors, lists, tuples, sets and dicts.

    Args:
        data: the whole archive.
        where: name of the file, for messages.

    Raises:
        UnsafeFileError: the data is not such an archive, holds other classes, or describes more than it holds.
    """
    _check_archive(io.BytesIO(data), len(data), where)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # torch raises nearly any class about an archive whose parts do not fit together.
    except Exception as error:
        raise UnsafeFileError(f"{where}: cannot be read ({reason_of(error)})") from error


def check_torch_file(path: Path) -> None:
    """Check an archive as `load_torch_bytes` does, for another library that opens it by its path.

    Raises:
        UnsafeFileError: as from `load_torch_bytes`, or the file is not regular.
        OSError: it cannot be read.
    """
    with open_regular(path, follow_link=True) as file:
        _check_archive(file, size_of(file), str(path))


def _check_archive(file: BinaryIO, size: int, where: str) -> None:
    records = _records(file, size, where)
    for name, expected in _SETTINGS.items():
        found = _read(file, records[name]) if name in records else expected[0]
        if found not in expected:
            raise UnsafeFileError(
                f"{where}: found {shortened(found.decode('latin-1'))} as {name}, expected what torch.save writes"
            )
    if "data.pkl" not in records:
        raise UnsafeFileError(f"{where}: found an archive without data.pkl, expected one that torch.save wrote")
    storages = {name.removeprefix("data/"): record.size for name, record in records.items() if name.startswith("data/")}
    machine = TorchPickle(_read(file, records["data.pkl"], size), where, storages)
    machine.run()
    # With strides of zero, a tensor of any shape can consist of one number of the archive.
    check_elements(where, machine.elements, size)


def _records(file: BinaryIO, size: int, where: str) -> dict[str, ZipRecord]:
    """Return the records by their names within the archive's only folder, in lower case."""
    try:
        records = zip_records(file, size)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{where}: {error}") from error
    # torch reads from the folder of the first record.
    folders = {record.name.partition("/")[0] for record in records.values()}
    if len(folders) > 1:
        raise UnsafeFileError(f"{where}: found an archive that torch.save did not write (with {len(folders)} folders)")
    return {name.partition("/")[2]: record for name, record in records.items()}


def _read(file: BinaryIO, record: ZipRecord, at_most: int = _LONGEST_SETTING) -> bytes:
    file.seek(record.data)
    return file.read(min(record.size, at_most))
