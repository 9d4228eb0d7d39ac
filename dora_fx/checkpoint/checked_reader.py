"""A reader of torch_dist checkpoints for torch's planners that checks every file before it uses it.

torch's own reader, which Megatron uses too, unpickles `.metadata` without restrictions and opens any file that it
names; an entry that `.metadata` calls an object is unpickled in the same way. This reader allows a short list of
classes and opens regular files of the checkpoint's own directory alone. What it checked is what it reads: tensors are
read through the handle that was checked.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from dora_fx.files import (
    StoredPiece,
    UnsafeFileError,
    load_torch_bytes,
    named_beside,
    open_regular,
    read_dcp_metadata,
    read_regular,
    size_of,
)

METADATA = ".metadata"

# With optimizer state, the largest runs have a `.metadata` of some hundred megabytes.
_MOST_METADATA = 1 << 30


class CheckedReader(FileSystemReader):
    """Reads the files of one checkpoint.

    Raises:
        UnsafeFileError: from every method, for a file that the format does not allow.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory

    @cached_property
    def metadata(self) -> Metadata:
        """The contents of `.metadata`, read once."""
        path = self.directory / METADATA
        return read_dcp_metadata(read_regular(path, at_most=_MOST_METADATA), str(path))

    # torch's method has a parameter `rank`. Where a reader has it, torch tries `.metadata` files of single ranks first.
    def read_metadata(self) -> Metadata:
        return self.metadata

    def check(self, keys: Iterable[str]) -> dict[str, TensorStorageMetadata]:
        """Check that the files hold the tensors that `.metadata` describes, before memory is allocated for them.

        Returns:
            The metadata of each tensor.
        """
        metadata = {key: self._stored(key) for key in keys}
        in_pieces = sum(self._check_chunks(key, stored) for key, stored in metadata.items())
        # Each chunk is within the files by itself; without the sum, one piece could stand for any number of chunks.
        in_files = sum(self._sizes.values())
        if in_pieces > in_files:
            raise UnsafeFileError(
                f"{self.directory / METADATA}: found tensors of {in_pieces:,} bytes, expected at most {in_files:,}, as "
                "the files have"
            )
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the pieces that a plan asks for, and hand each to the planner once its bytes are checked."""
        by_file: dict[str, list[tuple[ReadItem, StoredPiece]]] = {}
        for item in plan.items:
            piece = self.storage_data[item.storage_index]
            by_file.setdefault(piece.name, []).append((item, piece))
        for name, wanted in by_file.items():
            path = named_beside(self.directory / METADATA, name)
            with open_regular(path) as file:
                for item, piece in wanted:
                    where = f"{path}, {item.storage_index.fqn}"
                    _check_inside(path, size_of(file), piece)
                    file.seek(piece.offset)
                    self._give(planner, item, load_torch_bytes(file.read(piece.length), where), where)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _give(self, planner: LoadPlanner, item: ReadItem, value: Any, where: str) -> None:
        if item.type is LoadItemType.BYTE_IO:
            # Planners unpickle these bytes without restrictions, so they get a pickle of the checked value, made here.
            written_here = io.BytesIO()
            torch.save(value, written_here)
            written_here.seek(0)
            planner.load_bytes(item, written_here)
            return
        expected = self._stored(item.storage_index.fqn).properties.dtype
        if not isinstance(value, Tensor) or value.dtype != expected:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UnsafeFileError(f"{where}: found {found}, expected a tensor of {expected}")
        target = planner.resolve_tensor(item).detach()
        target.copy_(_part(value, item, target.shape, where))
        planner.commit_tensor(item, target)

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            found = "an object" if stored is not None else "nothing"
            raise UnsafeFileError(f"{self.directory / METADATA}: found {found} as {key}, expected a tensor")
        return stored

    def _check_chunks(self, key: str, stored: TensorStorageMetadata) -> int:
        """Check that the files hold all of a tensor; return the number of bytes that its pieces take."""
        pieces = [self._piece(key, stored, chunk) for chunk in stored.chunks]
        # Chunks that overlap can hide a gap, so `read_adapters` reads into tensors that are filled with zeros.
        covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if covered < math.prod(stored.size):
            raise UnsafeFileError(
                f"{self.directory / METADATA}: found {covered:,} elements of {key} in the files, expected "
                f"{math.prod(stored.size):,} for its shape {tuple(stored.size)}"
            )
        return sum(piece.length for piece in pieces)

    def _piece(self, key: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> StoredPiece:
        """Find the piece that holds a chunk, and check that it lies within its file and is large enough."""
        where = f"{self.directory / METADATA}: {key}"
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        if not len(chunk.offsets) == len(chunk.sizes) == len(stored.size) or any(
            end > size for end, size in zip(ends, stored.size, strict=True)
        ):
            raise UnsafeFileError(f"{where} has a chunk outside its shape {tuple(stored.size)}")
        piece = self.metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if piece is None:
            raise UnsafeFileError(f"{where} has a chunk at {tuple(chunk.offsets)} that is in no file")
        path = named_beside(self.directory / METADATA, piece.name)
        _check_inside(path, self._size_of(path), piece)
        if math.prod(chunk.sizes) * stored.properties.dtype.itemsize > piece.length:
            raise UnsafeFileError(
                f"{where} has a chunk of shape {tuple(chunk.sizes)}, for which the {piece.length:,} bytes in "
                f"{path.name} are too few"
            )
        return piece

    def _size_of(self, path: Path) -> int:
        if path.name not in self._sizes:
            with open_regular(path) as file:
                self._sizes[path.name] = size_of(file)
        return self._sizes[path.name]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {}


def load_checked(state: dict[str, Any], reader: CheckedReader, planner: LoadPlanner | None = None) -> None:
    """Fill the tensors of a flat state dict from a checkpoint, and replace its BytesIO entries by the stored objects.

    Each rank calls it by itself, after it checked the tensors with `CheckedReader.check`.

    Raises:
        UnsafeFileError, OSError: from `CheckedReader`.
    """
    try:
        with warnings.catch_warnings():
            # torch says so of every load with `no_dist`, which is meant here: ranks read different things.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            checkpoint.load(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as collected:
        (error, _), *_ = collected.failures.values()
        if isinstance(error, (UnsafeFileError, OSError)):
            raise error from None
        # torch and Megatron raise any class about parts that do not fit together.
        raise UnsafeFileError(f"{reader.directory}: cannot be read ({type(error).__name__}: {error})") from error


def _check_inside(path: Path, size: int, piece: StoredPiece) -> None:
    if piece.offset + piece.length > size:
        raise UnsafeFileError(
            f"{path}: found {size:,} bytes, expected at least {piece.offset + piece.length:,} by {METADATA}"
        )


def _part(tensor: Tensor, item: ReadItem, expected: torch.Size, where: str) -> Tensor:
    """Cut out of a stored chunk the part that a plan asks for."""
    try:
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
    except (IndexError, RuntimeError, ValueError) as error:
        raise UnsafeFileError(
            f"{where}: found a tensor of shape {tuple(tensor.shape)}, expected the shape of its chunk in {METADATA}"
        ) from error
    if tensor.shape != expected:
        raise UnsafeFileError(f"{where}: found a tensor of shape {tuple(tensor.shape)}, expected {tuple(expected)}")
    return tensor
