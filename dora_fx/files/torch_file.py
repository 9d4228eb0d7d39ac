"""Files of `torch.save`: a zip archive of one pickle and the bytes of the tensors it describes.

`torch.load(weights_only=True)` builds what is on a list of its own alone. That list is the process's: Megatron adds
NumPy's constructors and others to it, and torch's own part has callables that take memory by the number they are given.
So the archive is compared first, in the bytes that torch reads then, with the shorter list of what plain data needs.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dora_fx.files.pickle_opcodes import opcodes
from dora_fx.files.regular_file import UnsafeFileError, open_regular, reason_of

# What torch's own unpickler of weights knows. GLOBAL names a class in place, so that no other opcode can make one up.
_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET"),
        *("LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST"),
        *("APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET"),
    }
)
_CLASSES = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch.storage UntypedStorage",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        # How protocol 2 writes bytes, sets and complex numbers.
        "_codecs encode",
        "__builtin__ set",
        "__builtin__ complex",
    }
)


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
    for name, argument in opcodes(_pickle_of(file, size, where), where):
        if name not in _OPCODES:
            raise UnsafeFileError(
                f"{where}: found the opcode {name} in its pickle, expected those that torch.save writes"
            )
        if name == "GLOBAL" and not _is_plain(argument):
            raise UnsafeFileError(
                f"{where}: found {argument.replace(' ', '.')} in it, expected numbers, text, tensors, lists and dicts; "
                "it may run code"
            )


def _pickle_of(file: BinaryIO, size: int, where: str) -> bytes:
    """The one pickle of an archive that no two readers of zip files can understand in different ways."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # torch finds records without regard to case, and looks in the folder of the first.
            names = [record.filename.lower() for record in records]
            folders = {name.partition("/")[0] for name in names}
            # Compressed, a few kilobytes hold gigabytes; torch.save never compresses.
            is_stored = all(
                record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
                for record in records
            )
            begins, ends = min((record.header_offset for record in records), default=-1), archive.comment == b""
            if len(set(names)) != len(names) or len(folders) != 1 or begins != 0 or not ends:
                raise UnsafeFileError(f"{where}: found an archive put together by something else than torch.save")
            if not is_stored or sum(record.file_size for record in records) > size:
                raise UnsafeFileError(f"{where}: found compressed records, or more bytes in them than the file has")
            return archive.read(f"{records[0].filename.partition('/')[0]}/data.pkl")
    except UnsafeFileError:
        raise
    except KeyError:
        raise UnsafeFileError(
            f"{where}: found an archive without data.pkl, expected one that torch.save wrote"
        ) from None
    # A damaged archive makes zipfile raise errors of several kinds.
    except Exception as error:
        raise UnsafeFileError(f"{where}: found no archive of torch.save ({error})") from error


def _is_plain(module_and_name: str) -> bool:
    module, _, name = module_and_name.partition(" ")
    value = vars(torch).get(name) if module == "torch" else None
    is_storage = isinstance(value, type) and issubclass(value, torch.TypedStorage)
    return module_and_name in _CLASSES or is_storage or isinstance(value, torch.dtype)
