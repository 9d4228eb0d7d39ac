"""Pickles of harmless classes that take a machine's memory, time or stack: in `common.pt`, weights and `.metadata`.

Beside each stands what torch, or pickle, makes of it without the check.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
import torch

from dora_fx.files.dcp_metadata import read_dcp_metadata
from dora_fx.files.regular_file import UnsafeFileError
from dora_fx.files.torch_file import check_torch_file, load_torch_bytes
from dora_fx.models import load_hf_checkpoint
from tests.hf_models import save_tiny_checkpoint
from tests.tables import every_case
from tests.unit.hostile_files import archive_with, is_endless

LOAD = "import sys, torch\npass\ntorch.load(sys.argv[1], weights_only=True)"
SHOW = "import sys, torch\npass\nstr(torch.load(sys.argv[1], weights_only=True))"
UNPICKLE = "import pickle, sys, torch\npass\npickle.load(open(sys.argv[1], 'rb'))"

ENCODE, SIZE, SET = b"c_codecs\nencode\n", b"ctorch\nSize\n", b"c__builtin__\nset\n"
NESTED = b")" + b"\x85" * 200_000
PAIRS = b")" + b"q\0h\0\x86" * 40


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def integers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def many_calls(function: bytes, arguments: bytes, count: int) -> bytes:
    """A tuple of the results of one call, with arguments that are spelled once."""
    return b"(" + function + b"q\1" + arguments + b"q\2" + b"h\1h\2R" * count + b"t"


# The pickle, the code that is endless with it, if it is not only malformed, and the refusal.
PICKLES: dict[str, tuple[bytes, str | None, str]] = {
    "nested key": (b"}" + NESTED + b"Ns", LOAD, "nested too deeply"),
    "nested in a set": (SET + b"]" + NESTED + b"a\x85R", LOAD, "nested too deeply"),
    "pairs as a key": (b"}" + PAIRS + b"Ns", LOAD, "that repeat others to more than"),
    "short key of a tuple": (b"})Ns", None, "expected text or integers as the keys of a dict"),
    "pairs as a value": (b"]" + b"q\0]h\0ah\0a" * 40, SHOW, "that repeat others to more than"),
    "keys of one hash": (
        b"}(" + b"".join(integer(n * (2**61 - 1)) + b"N" for n in range(1, 60_000)) + b"u",
        LOAD,
        "expected text or integers as the keys",
    ),
    "bytes": (many_calls(ENCODE, text("a" * 100_000) + text("latin1") + b"\x86", 20_000), LOAD, "that repeat others"),
    "sizes": (many_calls(SIZE, integers(*range(10_000)) + b"\x85", 20_000), LOAD, "that repeat others"),
    "another codec": (
        ENCODE + text("".join(map(chr, range(0x4E00, 0x9F00))) * 8) + text("punycode") + b"\x86R",
        LOAD,
        "found 'punycode' in its pickle, expected latin1",
    ),
    "a list in itself": (b"]q\0h\0a", None, "found a list in its pickle, expected no change of a value"),
    "a dict of pairs": (
        b"ccollections\nOrderedDict\n]" + text("a") + b"N\x86a\x85R",
        None,
        "found a call of collections.OrderedDict with list, expected nothing",
    ),
    "an attribute": (
        b"ccollections\nOrderedDict\n)R}" + text("items") + b"ctorch\nSize\nsb",
        None,
        "expected no attributes but _metadata",
    ),
    "below a mark": (b"N(\x86", None, "found no whole pickle"),
    "no such place": (b"h\7", None, "found no whole pickle"),
}  # fmt: skip


@every_case("name", PICKLES)
def test_pickles_of_archives(name: str, tmp_path: Path) -> None:
    body, code, message = PICKLES[name]
    path = tmp_path / "common.pt"
    path.write_bytes(archive_with(pickled(body)))
    assert code is None or is_endless(code, path, seconds=1)
    assert path.stat().st_size < 2 << 20
    with pytest.raises(UnsafeFileError, match=rf"^{path}: [^\n]*{message}"):
        load_torch_bytes(path.read_bytes(), str(path))


RECORD = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
METADATA_PICKLES: dict[str, tuple[bytes, bool, str]] = {
    "nested key": (b"}" + NESTED + b"Ns", True, "nested too deeply"),
    "pairs as a key": (b"}" + PAIRS + b"Ns", True, "that repeat others to more than"),
    "sizes": (many_calls(SIZE, integers(*range(10_000)) + b"\x85", 20_000), True, "that repeat others"),
    "arguments": (many_calls(RECORD, integers(*range(10_000)), 20_000), False, "that repeat others"),
    "an opcode of others": (b"\x8f", False, "found the opcode EMPTY_SET"),
    "a changed class": (b"ctorch\nSize\n}b", False, "expected a state of an object alone"),
}


@every_case("name", METADATA_PICKLES)
def test_pickles_of_metadata(name: str, tmp_path: Path) -> None:
    body, harms, message = METADATA_PICKLES[name]
    path = tmp_path / ".metadata"
    path.write_bytes(pickled(body))
    assert not harms or is_endless(UNPICKLE, path, seconds=1)
    with pytest.raises(UnsafeFileError, match=rf"^{path}: [^\n]*{message}"):
        read_dcp_metadata(path.read_bytes(), str(path))


FLOATS = b"torch\nFloatStorage\n"


def storage(count: int, kind: bytes = FLOATS, key: str = "0") -> bytes:
    return b"(" + text("storage") + b"c" + kind + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor(stored: bytes, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], hooks: bytes = b"}") -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + integer(offset)
    return call + integers(*sizes) + integers(*strides) + b"\x89" + hooks + b"tR"


NO_ROOM = "expected one within the 16 bytes of its storage"
TENSORS = {
    "a larger storage": (tensor(storage(1 << 20), 0, (4,), (1,)), "expected the 16 bytes of the archive's record"),
    "a smaller storage": (tensor(storage(2), 0, (2,), (1,)), "expected the 16 bytes of the archive's record"),
    "a negative storage": (tensor(storage(-4), 0, (4,), (1,)), "expected the 16 bytes of the archive's record"),
    "no storage": (tensor(storage(4, key="../data.pkl"), 0, (4,), (1,)), "expected a record of the archive"),
    "a storage of another class": (
        tensor(storage(4, b"collections\nOrderedDict\n"), 0, (4,), (1,)),
        "expected the 16 bytes of the archive's record",
    ),
    "an offset": (tensor(storage(4), 1 << 26, (1,), (1,)), NO_ROOM),
    "a negative offset": (tensor(storage(4), -1, (1,), (1,)), NO_ROOM),
    "a size": (tensor(storage(4), 0, (1 << 26,), (1,)), NO_ROOM),
    "a negative size": (tensor(storage(4), 0, (-1,), (1,)), "expected a size, a stride or an offset"),
    "a stride": (tensor(storage(4), 1, (2,), (3,)), NO_ROOM),
    "a negative stride": (tensor(storage(4), 3, (2,), (-1,)), "expected a size, a stride or an offset"),
    "too few strides": (tensor(storage(4), 0, (2, 2), (1,)), NO_ROOM),
    "an overflow": (tensor(storage(4), 0, (1 << 62, 4), (1 << 62, 1)), NO_ROOM),
    "a large view": (tensor(storage(4), 0, (1 << 40,), (0,)), "found 1,099,511,627,776 elements of tensors"),
    "a hook": (tensor(storage(4), 0, (4,), (1,), b"}Nctorch\nSize\ns"), "expected no hooks of a tensor"),
    "a state": (tensor(storage(4), 0, (4,), (1,)) + integers(1) + b"b", "expected no attributes but _metadata"),
}  # fmt: skip


@every_case("name", TENSORS)
def test_tensors_that_are_not_in_the_archive(name: str) -> None:
    """torch refuses most of them on a CPU, and takes a file at its word on the meta device, where shapes are read."""
    body, message = TENSORS[name]
    planted = archive_with(pickled(body), **{"0": struct.pack("<4f", 1, 2, 3, 4)})
    if name in ("a larger storage", "an offset", "a size", "a stride", "a large view"):
        torch.load(io.BytesIO(planted), map_location="meta", weights_only=True)
    with pytest.raises(UnsafeFileError, match=rf"^a: [^\n]*{message}"):
        load_torch_bytes(planted, "a")


def test_weights_of_a_base(tmp_path: Path) -> None:
    """The same check stands before transformers' files."""
    base = save_tiny_checkpoint(tmp_path / "base")
    (base / "model.safetensors").unlink()
    path = base / "pytorch_model.bin"
    path.write_bytes(archive_with(pickled(PICKLES["nested key"][0])))
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin: found values nested too deeply .*; download"):
        load_hf_checkpoint(base)
    path.write_bytes(archive_with(pickled(tensor(storage(4), 1, (4,), (1,))), **{"0": bytes(16)}))
    with pytest.raises(UnsafeFileError, match=r"found a tensor of shape \(4\), strides \(1\) and offset 1, expected"):
        check_torch_file(path)
