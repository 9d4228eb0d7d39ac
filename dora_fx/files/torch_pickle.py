"""Checks the pickle of a `torch.save` file: numbers, text, bytes, tensors, lists, tuples, sets and dicts.

A tensor is a call with a storage, an offset, a shape and strides, and a file may state any of them. Here the tensor
must lie within its storage, and the storage must have the size of the archive's record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dora_fx.files.message_text import shortened
from dora_fx.files.pickle_machine import AbstractValue, PickleMachine
from dora_fx.files.regular_file import UnsafeFileError

# Opcodes that torch's pickler writes and its unpickler of weights knows. GLOBAL has the name of the class as its
# argument; STACK_GLOBAL, which takes names that other opcodes compute, is not among them.
_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET"),
        *("LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST"),
        *("APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    }
)
# Kinds of the result and the arguments of each call. A tensor may have one more argument, a dict with its conjugation.
_CALLS = {
    "collections OrderedDict": ("dict", ()),
    "torch Size": ("tuple", ("tuple",)),
    "torch._utils _rebuild_tensor_v2": (
        "tensor",
        ("storage", "integer", "tuple", "tuple", "plain", "dict"),
    ),
    "torch._utils _rebuild_tensor_v3": (
        "tensor",
        ("storage", "integer", "tuple", "tuple", "plain", "dict", "class"),
    ),
    "torch._utils _rebuild_parameter": ("tensor", ("tensor", "plain", "dict")),
    # How protocol 2 writes bytes, sets and complex numbers.
    "_codecs encode": ("bytes", ("text", "text")),
    "__builtin__ set": ("set", ("list",)),
    "__builtin__ complex": ("plain", ("plain", "plain")),
}
# Bytes per element; tensors of newer dtypes have untyped storages.
_STORAGES = {
    "torch.storage UntypedStorage": 1,
    **{f"torch {name}Storage": 1 for name in ("Byte", "Char", "Bool")},
    **{f"torch {name}Storage": 2 for name in ("Short", "Half", "BFloat16")},
    **{f"torch {name}Storage": 4 for name in ("Int", "Float")},
    **{f"torch {name}Storage": 8 for name in ("Long", "Double", "ComplexFloat")},
    "torch ComplexDoubleStorage": 16,
}
_STORAGE_KINDS = ["text", "class", "text", "text", "integer"]
_ORDERED_DICT_STATE = ["_metadata"]
_MOST = 2**63


class TorchPickle(PickleMachine):
    """Runs the pickle of one archive.

    Attributes:
        elements: number of elements of all tensors so far, by their shapes.
    """

    def __init__(self, data: bytes, where: str, records: Mapping[str, int]) -> None:
        """Take the pickle, the name of its file, and the sizes of the archive's storages by their keys."""
        super().__init__(data, where, _OPCODES)
        self.elements = 0
        self._records = records

    def named(self, module: str, name: str) -> AbstractValue:
        full = f"{module} {name}"
        if full not in _CALLS and full not in _STORAGES and _dtype_of(full) is None:
            raise UnsafeFileError(
                f"{self.where}: found {module}.{name} in it, expected numbers, text, tensors, lists and dicts; "
                "it may run code"
            )
        return AbstractValue("class", full)

    def called(self, name: Any, arguments: Sequence[AbstractValue]) -> AbstractValue:
        kind, expected = _CALLS.get(name, ("", ()))
        kinds = tuple(argument.kind for argument in arguments)
        has_more = kind == "tensor" and kinds == (*expected, "dict")
        if not kind or (kinds != expected and not has_more):
            raise UnsafeFileError(
                f"{self.where}: found a call of {name.replace(' ', '.')} with {_listed(kinds)}, expected "
                f"{_listed(expected)}"
            )
        if name == "torch Size":
            self._numbers(arguments[0])
        elif name == "__builtin__ set" and not arguments[0].content:
            raise self.unexpected(arguments[0], "text or numbers alone in a set")
        # Other codecs can take quadratic time.
        elif name == "_codecs encode" and arguments[1].content != "latin1":
            raise self.unexpected(arguments[1], "latin1 as the encoding of bytes")
        elif kind == "tensor":
            self._check_tensor(name, arguments)
        return AbstractValue(kind, list(arguments[0].content) if name == "torch Size" else [])

    def built(self, value: AbstractValue, state: AbstractValue) -> None:
        # A state set on a tensor would bring a storage and sizes of its own, past the checks of the call.
        if value.kind != "dict" or state.kind != "dict" or state.content != _ORDERED_DICT_STATE:
            raise self.unexpected(value, "no attributes but _metadata of an OrderedDict")

    def persistent(self, value: AbstractValue) -> AbstractValue:
        parts = value.content if value.kind == "tuple" else []
        if [part.kind for part in parts] != _STORAGE_KINDS or parts[0].content != "storage":
            raise self.unexpected(value, "a storage of the archive, by its class, key, device and size")
        _, kind, key, _, count = (part.content for part in parts)
        itemsize = _STORAGES.get(kind, 0)
        size = self._records.get(key.lower())
        if size is None or not itemsize or count * itemsize != size:
            expected = "a record of the archive" if size is None else f"the {size:,} bytes of the archive's record"
            raise UnsafeFileError(
                f"{self.where}: found {count:,} elements of {kind.replace(' ', '.')} as the storage {shortened(key)}, "
                f"expected {expected}"
            )
        return AbstractValue("storage", (size, itemsize), span=value.span)

    def _check_tensor(self, name: str, arguments: Sequence[AbstractValue]) -> None:
        hooks = arguments[2 if name.endswith("parameter") else 5]
        if hooks.content:
            raise self.unexpected(hooks, "no hooks of a tensor")
        if name.endswith("parameter"):
            return
        (size, itemsize), offset = arguments[0].content, arguments[1].content
        if name.endswith("v3"):
            itemsize = getattr(_dtype_of(arguments[6].content), "itemsize", 0)
        sizes, strides = self._numbers(arguments[2]), self._numbers(arguments[3])
        self.elements += math.prod(sizes)
        end = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
        fits = offset >= 0 and itemsize and (0 in sizes or end * itemsize <= size)
        if len(sizes) != len(strides) or not fits:
            raise UnsafeFileError(
                f"{self.where}: found a tensor of shape {_shown(sizes)}, strides {_shown(strides)} and offset "
                f"{shortened(offset)}, expected one within the {size:,} bytes of its storage"
            )

    def _numbers(self, value: AbstractValue) -> list[int]:
        for part in value.content:
            if part.kind != "integer" or not 0 <= part.content < _MOST:
                raise self.unexpected(part, "a size, a stride or an offset")
        return [part.content for part in value.content]


def _shown(sizes: Sequence[int]) -> str:
    """Format sizes or strides for a message, whatever their number."""
    return f"({', '.join(map(str, sizes[:8]))}{', ...' if len(sizes) > 8 else ''})"


def _dtype_of(name: str) -> torch.dtype | None:
    module, _, attribute = name.partition(" ")
    value = vars(torch).get(attribute) if module == "torch" else None
    return value if isinstance(value, torch.dtype) else None


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:8]) or "nothing"
