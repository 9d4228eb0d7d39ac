"""Files of `torch.save`: a zip archive of one pickle and the bytes of the tensors it describes.

`torch.load(weights_only=True)` builds what is on a list of its own alone. That list is the process's: Megatron adds
NumPy's constructors and others to it, and torch's own part has callables that take memory by the number they are given.
So the archive is looked at first, as `torch_pickle.py` says, in the bytes that torch reads then.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dora_fx.files.model_sizes import check_elements
from dora_fx.files.regular_file import UnsafeFileError, open_regular, reason_of, shortened
from dora_fx.files.torch_pickle import TorchPickle
from dora_fx.files.zip_layout import ZipRecord, zip_records

# Small records by which torch reads the others; with an alignment of zero it divides by it, and the process ends.
_SETTINGS = {"byteorder": (b"little", b"big"), ".storage_alignment": tuple(b"%d" % (1 << bits) for bits in range(21))}
_LONGEST_SETTING = 64


def load_torch_bytes(data: bytes, where: str) -> Any:
    """Read what `torch.save` wrote, onto the CPU: numbers, text, bytes, tensors, lists, tuples, sets and dicts.

    Args:
        data: the whole archive.
        where: it comes from, for messages.

    Raises:
        UnsafeFileError: it is no archive of `torch.save`, has other classes in it, or more bytes than `data` has.
    """
    _check_archive(io.BytesIO(data), len(data), where)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # torch raises nearly anything about an archive whose parts do not fit together.
    except Exception as error:
        raise UnsafeFileError(f"{where}: cannot be read ({reason_of(error)})") from error


def check_torch_file(path: Path) -> None:
    """Check an archive, as `load_torch_bytes` does, that another library opens by its path.

    Raises:
        UnsafeFileError: as `load_torch_bytes`, or it is no regular file.
        OSError: it cannot be read.
    """
    with open_regular(path, follow_link=True) as file:
        _check_archive(file, os.fstat(file.fileno()).st_size, str(path))


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
    # A tensor may be one number of the archive as often as its shape says.
    check_elements(where, machine.elements, size)


def _records(file: BinaryIO, size: int, where: str) -> dict[str, ZipRecord]:
    """The records by their names in the archive's one folder, in lower case."""
    try:
        records = zip_records(file, size)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{where}: {error}") from error
    # torch looks in the folder of the first.
    folders = {record.name.partition("/")[0] for record in records.values()}
    if len(folders) > 1:
        raise UnsafeFileError(
            f"{where}: found an archive put together by something else than torch.save (of {len(folders)} folders)"
        )
    return {name.partition("/")[2]: record for name, record in records.items()}


def _read(file: BinaryIO, record: ZipRecord, at_most: int = _LONGEST_SETTING) -> bytes:
    file.seek(record.data)
    return file.read(min(record.size, at_most))
