"""Reads torch_dist checkpoints for torch's planners, and trusts nothing that is in them.

torch's own reader loads `.metadata` as any pickle and opens whatever files it names; a tensor that `.metadata` calls
an object is loaded as any pickle too. Megatron's reader is torch's. Here every file is opened once, and what was
checked is what is used.
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

# `.metadata` of the largest runs, with their optimizers, is some hundred megabytes.
_MOST_METADATA = 1 << 30


class CheckedReader(FileSystemReader):
    """The files of one checkpoint.

    Raises:
        UnsafeFileError: by every method, for a file that is not what the format allows.
        OSError: a file is not there or cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory

    @cached_property
    def metadata(self) -> Metadata:
        """The contents of `.metadata`, read once."""
        path = self.directory / METADATA
        return read_dcp_metadata(read_regular(path, at_most=_MOST_METADATA), str(path))

    # Without the parameter `rank` of torch's method, for which torch would go on to files of the ranks.
    def read_metadata(self) -> Metadata:
        return self.metadata

    def check(self, keys: Iterable[str]) -> dict[str, TensorStorageMetadata]:
        """Check that tensors lie in the files as they are described, before anybody makes room for them.

        Returns:
            The description of each tensor.
        """
        described = {key: self._stored(key) for key in keys}
        in_pieces = sum(self._check_chunks(key, stored) for key, stored in described.items())
        # Else one piece could stand for any number of chunks.
        in_files = sum(self._sizes.values())
        if in_pieces > in_files:
            raise UnsafeFileError(
                f"{self.directory / METADATA}: found tensors in {in_pieces:,} bytes, where the files have {in_files:,}"
            )
        return described

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan asks for, each piece as bytes that are checked and then given to torch."""
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
            # Planners load these bytes as any pickle, so they get some that were written here.
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
        """The number of bytes of the files that have a tensor, once they are known to have all of it."""
        pieces = [self._piece(key, stored, chunk) for chunk in stored.chunks]
        covered = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
        if covered < math.prod(stored.size):
            raise UnsafeFileError(
                f"{self.directory / METADATA}: found {covered:,} elements of {key} in the files, expected "
                f"{math.prod(stored.size):,} for its shape {tuple(stored.size)}"
            )
        return sum(piece.length for piece in pieces)

    def _piece(self, key: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> StoredPiece:
        """Return the place of a chunk, once it is known to be in a file."""
        where = f"{self.directory / METADATA}: {key}"
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        if not len(chunk.offsets) == len(chunk.sizes) == len(stored.size) or any(
            end > size for end, size in zip(ends, stored.size, strict=True)
        ):
            raise UnsafeFileError(f"{where} has a chunk outside its shape {tuple(stored.size)}")
        piece = self.metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if piece is None:
            raise UnsafeFileError(f"{where} has a chunk at {tuple(chunk.offsets)} that no file has")
        path = named_beside(self.directory / METADATA, piece.name)
        _check_inside(path, self._size_of(path), piece)
        if math.prod(chunk.sizes) * stored.properties.dtype.itemsize > piece.length:
            raise UnsafeFileError(
                f"{where} has a chunk of shape {tuple(chunk.sizes)}, for which {piece.length:,} bytes of {path.name} "
                "are too few"
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
    """Fill the tensors of a flat state dict from a checkpoint, and put its objects in the place of BytesIO ones.

    Each rank calls it by itself, and has the tensors checked with `CheckedReader.check`.

    Raises:
        UnsafeFileError, OSError: as `CheckedReader`.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            checkpoint.load(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as collected:
        (error, _), *_ = collected.failures.values()
        if isinstance(error, (UnsafeFileError, OSError)):
            raise error from None
        # What torch and Megatron raise about parts that do not fit together.
        raise UnsafeFileError(f"{reader.directory}: cannot be read ({type(error).__name__}: {error})") from error


def _check_inside(path: Path, size: int, piece: StoredPiece) -> None:
    if piece.offset + piece.length > size:
        raise UnsafeFileError(
            f"{path}: found {size:,} bytes, expected at least {piece.offset + piece.length:,} for what {METADATA} says"
        )


def _part(tensor: Tensor, item: ReadItem, expected: torch.Size, where: str) -> Tensor:
    """The part of a stored chunk that a plan asks for."""
    try:
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
    except (IndexError, RuntimeError, ValueError) as error:
        raise UnsafeFileError(
            f"{where}: found a tensor of shape {tuple(tensor.shape)}, not the one described"
        ) from error
    if tensor.shape != expected:
        raise UnsafeFileError(f"{where}: found a tensor of shape {tuple(tensor.shape)}, expected {tuple(expected)}")
    return tensor
