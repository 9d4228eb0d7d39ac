"""Reads `.metadata` of torch's distributed checkpoints, a pickle that torch loads without restrictions.

Every class in the pickle becomes an inert record of its arguments and state, so that loading it calls nothing of torch
or of another package. The parts that torch's planners read are then checked and converted to torch's own classes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dora_fx.files.message_text import reason_of, shortened
from dora_fx.files.pickle_machine import AbstractValue, PickleMachine
from dora_fx.files.regular_file import UnsafeFileError

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "BytesStorageMetadata"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # Plans of the ranks, which some writers leave in the file.
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
# Replaced by builtin types, which a pickle cannot modify.
_BUILTINS = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}

# The opcodes that Python's pickler uses for such values, in any protocol.
_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    }
)
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class StoredPiece:
    """The place in the checkpoint's files where one chunk of a tensor, or one object, lies as `torch.save` wrote it.

    Attributes:
        name: of the file.
        offset, length: in bytes.
    """

    name: str
    offset: int
    length: int


def read_dcp_metadata(data: bytes, where: str) -> Metadata:
    """Convert the bytes of `.metadata` to torch's class, with `StoredPiece` objects as its storage data.

    Args:
        data: the bytes of the file.
        where: name of the file, for messages.

    Raises:
        UnsafeFileError: the file is damaged, or has classes or types that such a file does not have.
    """
    # First on abstract values, which shows that unpickling takes time and memory in proportion to the file.
    _MetadataPickle(data, where, _OPCODES).run()
    unpickler = _RecordUnpickler(data, where)
    try:
        record = unpickler.load()
    except UnsafeFileError:
        raise
    # A pickle can make the unpickler raise anything.
    except Exception as error:
        raise UnsafeFileError(f"{where}: cannot be read ({reason_of(error)})") from error
    return _MetadataBuilder(where).metadata(record)


class _MetadataPickle(PickleMachine):
    """Runs the pickle of one file. Records may be keys too: they are hashed by identity."""

    def named(self, module: str, name: str) -> AbstractValue:
        _check_known(module, name, self.where)
        return AbstractValue("class", (module, name))

    def called(self, name: tuple[str, str], arguments: Sequence[AbstractValue]) -> AbstractValue:
        if name not in _BUILTINS:
            return AbstractValue("record")
        if name == ("torch", "Size") and [argument.kind for argument in arguments] == ["tuple"]:
            return AbstractValue("tuple", arguments[0].content)
        if name == ("collections", "OrderedDict") and not arguments:
            return AbstractValue("dict", [])
        raise UnsafeFileError(f"{self.where}: found a call of {'.'.join(name)}, expected one with a tuple or nothing")

    def built(self, value: AbstractValue, state: AbstractValue) -> None:
        if value.kind != "record":
            raise self.unexpected(value, "a state of an object alone")

    def is_key(self, value: AbstractValue) -> bool:
        return value.kind == "record" or super().is_key(value)


class _RecordUnpickler(pickle.Unpickler):
    """Makes records of the classes on the list, and refuses all others."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._records: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        _check_known(module, name, self._where)
        if (module, name) in _BUILTINS:
            return _BUILTINS[module, name]
        if _is_dtype(module, name):
            return vars(torch)[name]
        if (module, name) not in self._records:
            # A new class for each file, since a pickle may set attributes of a class.
            self._records[module, name] = _record_class(name)
        return self._records[module, name]


def _check_known(module: str, name: str, where: str) -> None:
    if (module, name) not in _BUILTINS and not _is_dtype(module, name) and name not in _RECORDS.get(module, ()):
        raise UnsafeFileError(
            f"{where}: found {shortened(f'{module}.{name}')} in it, expected a checkpoint's classes; it may run code"
        )


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(vars(torch).get(name), torch.dtype)


def _record_class(name: str) -> type:
    def construct(self: Any, *arguments: Any) -> None:
        self.arguments = arguments

    def set_state(self: Any, state: Any) -> None:
        self.state = state

    return type(name, (), {"state": None, "__init__": construct, "__setstate__": set_state})


class _MetadataBuilder:
    """Converts the records of one file to torch's classes."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._pieces_left = 0

    def metadata(self, value: Any) -> Metadata:
        fields = self._fields(value, "Metadata")
        tensors = self._dict(fields, "state_dict_metadata")
        pieces = self._dict(fields, "storage_data")
        self._pieces_left = len(pieces)
        return Metadata(
            state_dict_metadata={self._text(key): self._stored(value) for key, value in tensors.items()},
            storage_data={self._index(key): self._piece(value) for key, value in pieces.items()},
        )

    def _stored(self, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(value).__name__ == "BytesStorageMetadata":
            return BytesStorageMetadata()
        fields = self._fields(value, "TensorStorageMetadata")
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=self._dtype(fields.get("properties"))),
            size=self._size(fields.get("size")),
            chunks=list(self._chunks(fields.get("chunks"))),
        )

    def _dtype(self, value: Any) -> torch.dtype:
        state = getattr(value, "state", None)
        dtype = state[0] if type(value).__name__ == "TensorProperties" and isinstance(state, tuple) and state else None
        if not isinstance(dtype, torch.dtype):
            raise self._wrong(value, "the properties of a tensor")
        return dtype

    def _chunks(self, value: Any) -> Iterator[ChunkStorageMetadata]:
        if not isinstance(value, list):
            raise self._wrong(value, "a list of chunks")
        # A pickle can name one long list many times, which would be converted each time.
        self._pieces_left -= len(value)
        if self._pieces_left < 0:
            raise UnsafeFileError(f"{self._where}: found more chunks of tensors than pieces in the files")
        for chunk in value:
            fields = self._fields(chunk, "ChunkStorageMetadata")
            yield ChunkStorageMetadata(self._size(fields.get("offsets")), self._size(fields.get("sizes")))

    def _index(self, value: Any) -> MetadataIndex:
        fields = self._fields(value, "MetadataIndex")
        offset, index = fields.get("offset"), fields.get("index")
        return MetadataIndex(
            self._text(fields.get("fqn")),
            None if offset is None else self._size(offset),
            None if index is None else self._count(index),
        )

    def _piece(self, value: Any) -> StoredPiece:
        fields = self._fields(value, "_StorageInfo")
        if fields.get("transform_descriptors"):
            raise self._wrong(fields["transform_descriptors"], "data as it is, not compressed or otherwise transformed")
        name = self._text(fields.get("relative_path"))
        return StoredPiece(name, self._count(fields.get("offset")), self._count(fields.get("length")))

    def _fields(self, value: Any, kind: str) -> Mapping[str, Any]:
        state = getattr(value, "state", None)
        if type(value).__name__ != kind or not isinstance(state, dict):
            raise self._wrong(value, f"a {kind}")
        return state

    def _dict(self, fields: Mapping[str, Any], name: str) -> dict[Any, Any]:
        if not isinstance(fields.get(name), dict):
            raise self._wrong(fields.get(name), f"a dict as {name}")
        return fields[name]

    def _size(self, value: Any) -> torch.Size:
        if not isinstance(value, tuple) or len(value) > _MOST_DIMENSIONS:
            raise self._wrong(value, f"at most {_MOST_DIMENSIONS} sizes")
        return torch.Size([self._count(size) for size in value])

    def _count(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise self._wrong(value, "a number of elements or bytes")
        return value

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._wrong(value, "a name")
        return value

    def _wrong(self, value: Any, expected: str) -> UnsafeFileError:
        return UnsafeFileError(f"{self._where}: found {shortened(value)}, expected {expected}")
