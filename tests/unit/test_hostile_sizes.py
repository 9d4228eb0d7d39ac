"""A checkpoint whose files are named, counted or described as they cannot be is refused before anybody believes it.

Beside it stands what a reader without the check does: it opens other files, waits, or makes room without end.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import dora_fx
from dora_fx import CheckpointError
from dora_fx.app.cli.main import main
from dora_fx.checkpoint import read_adapters
from tests.tables import every_case
from tests.unit.checkpoints import adapted, are_equal, values
from tests.unit.hostile_files import (
    COMMON,
    DATA,
    MANIFEST,
    METADATA,
    edit_manifest,
    is_endless,
    metadata_of,
    recompute_checksums,
    saved,
    write_metadata,
)

pytestmark = pytest.mark.usefixtures("world")

KEY = "decoder.layers.mlp.linear_fc1.adapter.linear_in.weight"
HASH_FILE = "import hashlib, sys\npass\nhashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256')"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(1), path, extra={"step": 3})
    return path


def refused(checkpoint: Path, message: str) -> None:
    """Every reader of checkpoints refuses it with the same words, and the model is as it was."""
    model = adapted(2)
    before = values(model)
    with pytest.raises(CheckpointError, match=message):
        dora_fx.load_checkpoint(model, checkpoint)
    with pytest.raises(CheckpointError, match=message):
        read_adapters(checkpoint)
    assert main(["inspect", str(checkpoint)]) in (1, 2)
    assert are_equal(before, values(model))


def name_a_file(checkpoint: Path, name: str, size: int = 0) -> None:
    edit_manifest(checkpoint, lambda content: content["files"].update({name: {"size": size, "sha256": EMPTY_SHA256}}))


@every_case("name", ["/dev/zero", "../outside", "a/../../outside", ".", "", "..", "folder/file", "a\0b"])
def test_names_lead_nowhere_else(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "outside").write_text("private")
    name_a_file(checkpoint, name)
    if name == "/dev/zero":
        assert is_endless(HASH_FILE, checkpoint / name)
    refused(checkpoint, r"as the name of a file, expected one of this folder|expected an object with printable names")


def test_a_link_is_not_followed(checkpoint: Path) -> None:
    outside = checkpoint.parent / "outside"
    (checkpoint / COMMON).rename(outside)
    (checkpoint / COMMON).symlink_to(outside)
    recompute_checksums(checkpoint)
    assert torch.load(checkpoint / COMMON, weights_only=True)["extra"] == {"step": 3}
    refused(checkpoint, r"common\.pt: found a symbolic link, expected a regular file; copy the folder with `cp -rL`")


def test_a_named_pipe_is_not_waited_for(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "pipe")
    name_a_file(checkpoint, "pipe")
    assert is_endless(HASH_FILE, checkpoint / "pipe", patience=3)
    refused(checkpoint, "pipe: found a named pipe, expected a regular file")
    (checkpoint / MANIFEST).unlink()
    os.mkfifo(checkpoint / MANIFEST)
    refused(checkpoint, rf"the directory has no {MANIFEST}")


def test_a_device_is_not_read(checkpoint: Path) -> None:
    try:
        os.mknod(checkpoint / "zero", 0o20666, os.makedev(1, 5))
        (checkpoint / "zero").open("rb").close()
    except PermissionError:
        pytest.skip("making a device is not permitted here")
    name_a_file(checkpoint, "zero")
    assert is_endless(HASH_FILE, checkpoint / "zero")
    refused(checkpoint, "zero: found a device, expected a regular file")


def test_a_file_of_another_size_is_not_read(checkpoint: Path) -> None:
    # Holes take no room on the disk, and hours to read.
    with (checkpoint / "holes").open("wb") as file:
        file.truncate(1 << 40)
    name_a_file(checkpoint, "holes", size=7)
    assert is_endless(HASH_FILE, checkpoint / "holes")
    refused(checkpoint, f"holes: found {1 << 40} bytes, expected 7")


def test_deep_nesting(checkpoint: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(RecursionError):
        json.loads(deep)
    (checkpoint / MANIFEST).write_text(deep)
    refused(checkpoint, "values nested too deeply")


@every_case(
    ("path", "value", "message"),
    [
        ("save_id", 3, "it.save_id is 3, expected printable text"),
        ("save_id", "\x1b]0;owned\x07", "expected printable text"),
        ("versions", ["a"], "it.versions is a value of type list, expected an object"),
        ("versions", {"\x1b[2J": "1"}, "expected an object with printable names"),
        ("layout", {"tp": 1}, "layout has no"),
        ("layout.tp", -1, "it.layout.tp is -1, expected a number from 0"),
        ("layout.tp", 10**30, "it.layout.tp is a value of type int, expected a number from 0"),
        ("non_homogeneous_layers", 1, "expected true or false"),
        ("sites", {"a": {"dim": 4}}, "expected an object of dim, alpha, scaling, dropout"),
        ("sites", {"a": {"dim": "4", "alpha": 8, "scaling": 2, "dropout": 0}}, "expected a number from 0"),
        ("sites", {"a": {"dim": 4, "alpha": math.nan, "scaling": 2, "dropout": 0}}, "expected a finite number"),
        ("tensors", {"a": {"shape": "44", "dtype": "float32"}}, "expected a list"),
        ("tensors", {"a": {"shape": [-1], "dtype": "float32"}}, "is -1, expected a number from 0"),
        ("tensors", {"a": {"shape": [4], "dtype": "load"}}, "found dtype 'load', expected one of torch's"),
        (
            "tensors",
            {"a": {"shape": [10**9, 10**9], "dtype": "float32"}},
            "bytes in tensors, expected no more than the",
        ),
        ("tensors", {"a" * 2000: {"shape": [4], "dtype": "float32"}}, "expected an object with printable names"),
        ("files", {"a": {"size": 3, "sha256": "x"}}, "expected a SHA-256 in hexadecimal"),
        ("files", {"a": {"size": 2**70, "sha256": EMPTY_SHA256}}, "expected a number from 0"),
        ("files", {"a": {"size": 3, "sha256": EMPTY_SHA256, "more": 1}}, "expected an object of size, sha256"),
        ("unknown", 1, "expected an object of save_id, versions"),
    ],
)
def test_values_of_other_types(checkpoint: Path, path: str, value: object, message: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            content = content[parent]
        content[name] = value

    edit_manifest(checkpoint, edit)
    refused(checkpoint, message)


def test_versions_of_other_packages_are_only_told(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda content: content["versions"].update({"another": "1.0"}))
    assert dora_fx.load_checkpoint(adapted(2), checkpoint) == {"step": 3}
    (checkpoint / METADATA).write_bytes(b"")
    recompute_checksums(checkpoint)
    with pytest.raises(CheckpointError, match=r"another 1\.0 \(here none\): .*\.metadata: found no whole pickle"):
        dora_fx.load_checkpoint(adapted(2), checkpoint)


def edit_metadata(checkpoint: Path, edit: Callable[[Any], object]) -> None:
    """Change what torch's metadata says of the tensor `KEY`, and of the piece of a file that has it."""
    metadata = metadata_of(checkpoint)
    edit(metadata)
    write_metadata(checkpoint, metadata)
    recompute_checksums(checkpoint)


def stored(metadata: Any) -> Any:
    return metadata.state_dict_metadata[KEY]


def piece(metadata: Any) -> Any:
    (found,) = [piece for index, piece in metadata.storage_data.items() if index.fqn == KEY]
    return found


def test_a_shape_that_no_file_has_room_for(checkpoint: Path) -> None:
    huge = torch.Size([1 << 20, 1 << 20, 1 << 20])

    def edit(metadata: Any) -> None:
        stored(metadata).size = huge
        stored(metadata).chunks[0].sizes = huge

    edit_metadata(checkpoint, edit)
    with pytest.raises(RuntimeError, match="memory"):
        torch.empty(stored(FileSystemReader(checkpoint).read_metadata()).size)
    message = rf"\.metadata: {KEY} has a chunk of shape .* for which the .* bytes in {DATA} are too few"
    refused(checkpoint, message)
    # In the chunks alone, and in the whole alone.
    edit_metadata(checkpoint, lambda metadata: setattr(stored(metadata), "size", torch.Size([1, 4, 32])))
    refused(checkpoint, "has a chunk outside its shape")


def test_elements_that_no_file_has(checkpoint: Path) -> None:
    """torch would leave what its memory has there."""

    def edit(metadata: Any) -> None:
        stored(metadata).size = torch.Size([1, 4, 320])

    edit_metadata(checkpoint, edit)
    tensor = torch.full((1, 4, 320), 7.0)
    dcp.load({KEY: tensor}, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    assert (tensor == 7.0).sum() == 4 * 288
    refused(checkpoint, rf"\.metadata: found 128 elements of {KEY} in the files, expected 1,280 for its shape")


@pytest.mark.parametrize("outside", ["../outside", "/outside"])
def test_a_piece_of_another_file(checkpoint: Path, outside: str) -> None:
    private = checkpoint.parent / "outside"
    private.write_bytes((checkpoint / DATA).read_bytes())
    name = str(private) if outside.startswith("/") else outside
    edit_metadata(checkpoint, lambda metadata: setattr(piece(metadata), "relative_path", name))
    tensor = torch.zeros(1, 4, 32)
    dcp.load({KEY: tensor}, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    assert tensor.count_nonzero() == 128
    refused(checkpoint, "as the name of a file, expected one of this folder")


def test_a_piece_beyond_its_file(checkpoint: Path) -> None:
    edit_metadata(checkpoint, lambda metadata: setattr(piece(metadata), "length", 1 << 50))
    refused(checkpoint, rf"{DATA}: found .* bytes, expected at least .* by \.metadata")


def test_a_piece_that_is_compressed(checkpoint: Path) -> None:
    edit_metadata(checkpoint, lambda metadata: setattr(piece(metadata), "transform_descriptors", ["zstd"]))
    refused(checkpoint, r"\.metadata: found a value of type list, expected data as it is, not compressed")


def test_a_chunk_that_no_file_has(checkpoint: Path) -> None:
    edit_metadata(checkpoint, lambda metadata: metadata.storage_data.clear())
    refused(checkpoint, "found more chunks of tensors than pieces in the files")


def test_one_list_of_chunks_under_many_names(checkpoint: Path) -> None:
    """A file of some kilobytes that takes the square of its size to read."""

    def edit(metadata: Any) -> None:
        shared = stored(metadata)
        shared.chunks *= 500
        metadata.state_dict_metadata |= {f"key {index}": shared for index in range(500)}

    edit_metadata(checkpoint, edit)
    refused(checkpoint, r"\.metadata: found values in its pickle that repeat others")


@pytest.mark.parametrize(
    "change", [lambda tensor: tensor.double(), lambda tensor: tensor[:, :2]], ids=["dtype", "shape"]
)
def test_a_tensor_that_is_not_the_one_described(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    planted = saved(change(torch.zeros(1, 4, 32)))

    def edit(metadata: Any) -> None:
        piece(metadata).offset, piece(metadata).length = (checkpoint / DATA).stat().st_size, max(len(planted), 600)

    edit_metadata(checkpoint, edit)
    with (checkpoint / DATA).open("ab") as file:
        file.write(planted.ljust(600, b"\0"))
    recompute_checksums(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{DATA}, {KEY}: "):
        read_adapters(checkpoint)


def test_one_piece_for_many_chunks(checkpoint: Path) -> None:
    """Each name of a piece takes some bytes, and would stand for as many elements as the piece has."""
    count = 512

    def edit(metadata: Any) -> None:
        shared = piece(metadata)
        stored(metadata).size = torch.Size([1, 4 * count, 32])
        for row in range(4, 4 * count, 4):
            offset = torch.Size([0, row, 0])
            stored(metadata).chunks.append(ChunkStorageMetadata(offset, torch.Size([1, 4, 32])))
            metadata.storage_data[MetadataIndex(KEY, offset)] = shared

    edit_metadata(checkpoint, edit)
    tensor = torch.zeros(1, 4 * count, 32)
    dcp.load({KEY: tensor}, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    assert tensor.count_nonzero() == tensor.numel()
    refused(checkpoint, r"\.metadata: found tensors of .* bytes, expected at most")


def test_one_opcode_that_makes_room_for_gigabytes(checkpoint: Path) -> None:
    """The memo of the pickle machine is an array, and this writes to its place 2^28."""
    planted = b"\x80\x04Nr" + struct.pack("<I", 1 << 28) + b"."
    (checkpoint / METADATA).write_bytes(planted)
    recompute_checksums(checkpoint)
    assert is_endless("import pickle, sys\npass\npickle.load(open(sys.argv[1], 'rb'))", checkpoint / METADATA)
    refused(checkpoint, r"\.metadata: found a pickle that writes to place 268435456 of its memo")
