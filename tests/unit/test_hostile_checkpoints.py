"""A checkpoint that somebody planted files in runs nothing, reads nothing else and takes no memory: it is refused.

Every attack is first shown to work on the reader of torch or Megatron that would open the file.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

import dora_fx
from dora_fx import CheckpointError
from dora_fx.app.cli.main import main
from dora_fx.checkpoint import read_adapters
from tests.tables import every_case
from tests.unit.checkpoints import adapted, are_equal, values
from tests.unit.hostile_files import (
    COMMON,
    DATA,
    METADATA,
    Payload,
    metadata_of,
    ran,
    recompute_checksums,
    saved,
    write_metadata,
)

pytestmark = pytest.mark.usefixtures("world")

KEY = "decoder.layers.mlp.linear_fc1.adapter.linear_in.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(1), path, extra={"step": 3})
    return path


def load_with_megatron(checkpoint: Path) -> object:
    stored = torch.zeros(1, 4, 32)
    return dist_checkpointing.load({"a": ShardedTensor.from_rank_offsets(KEY, stored)}, str(checkpoint))


def load_with_torch(checkpoint: Path) -> object:
    return dcp.load({KEY: torch.zeros(1, 4, 32)}, storage_reader=FileSystemReader(checkpoint), no_dist=True)


def plant_metadata(checkpoint: Path, marker: Path) -> None:
    write_metadata(checkpoint, Payload(marker))


def hide_in_metadata(checkpoint: Path, marker: Path) -> None:
    """Where torch's metadata has room for anything."""
    metadata = metadata_of(checkpoint)
    metadata.planner_data = {"a": [Payload(marker)]}
    write_metadata(checkpoint, metadata)


def reach_through_an_allowed_module(checkpoint: Path, marker: Path) -> None:
    """The module that defines torch's classes imports `os`, and a name may have dots."""
    module, name = "torch.distributed.checkpoint.metadata", "os.mkdir"
    write_global(checkpoint, module, name, str(marker))


def reach_through_an_allowed_class(checkpoint: Path, marker: Path) -> None:
    module, name = "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"
    write_global(checkpoint, module, name, str(marker), reads_attribute=True)


def write_global(checkpoint: Path, module: str, name: str, argument: str, *, reads_attribute: bool = False) -> None:
    """A pickle that calls a function by its module and name; or one that takes it from a dict of that name."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    if reads_attribute:
        # operator.attrgetter and getitem are functions that a pickle may name, too.
        os_module = text("operator") + text("getitem") + b"\x93" + text(module) + text(name) + b"\x93" + text("os")
        function = text("builtins") + text("getattr") + b"\x93" + os_module + b"\x86R" + text("mkdir") + b"\x86R"
    else:
        function = text(module) + text(name) + b"\x93"
    (checkpoint / METADATA).write_bytes(b"\x80\x04" + function + text(argument) + b"\x85R.")


def plant_metadata_of_a_rank(checkpoint: Path, marker: Path) -> None:
    """torch goes on to this file where it cannot read the other."""
    (checkpoint / METADATA).write_bytes(b"")
    (checkpoint / f"__0{METADATA}").write_bytes(pickle.dumps(Payload(marker)))


def call_a_tensor_an_object(checkpoint: Path, marker: Path) -> None:
    """torch's planner loads objects as any pickle, and `.metadata` says what is an object."""
    metadata = metadata_of(checkpoint)
    declared: Any = BytesStorageMetadata()
    declared.size = metadata.state_dict_metadata[KEY].size
    metadata.state_dict_metadata[KEY] = declared
    planted = saved([Payload(marker)])
    (index,) = [index for index in metadata.storage_data if index.fqn == KEY]
    piece = metadata.storage_data.pop(index)
    piece.offset, piece.length = (checkpoint / DATA).stat().st_size, len(planted)
    metadata.storage_data[MetadataIndex(KEY)] = piece
    with (checkpoint / DATA).open("ab") as file:
        file.write(planted)
    write_metadata(checkpoint, metadata)


@dataclass(frozen=True)
class Attack:
    """One planted file, whom it works on, and the refusal's words."""

    plant: Callable[[Path, Path], None]
    works_on: Callable[[Path], object]
    refusal: str


RUNS_CODE = {
    "metadata": Attack(plant_metadata, load_with_torch, r"\.metadata: found 'posix\.mkdir' in it"),
    "in_metadata": Attack(hide_in_metadata, load_with_megatron, r"\.metadata: found 'posix\.mkdir' in it"),
    "dotted_name": Attack(reach_through_an_allowed_module, load_with_torch, r"metadata\.os\.mkdir' in it"),
    "globals": Attack(reach_through_an_allowed_class, load_with_torch, r"found 'builtins\.getattr' in it"),
    "rank": Attack(plant_metadata_of_a_rank, load_with_torch, r"\.metadata: found no whole pickle"),
    "object": Attack(call_a_tensor_an_object, load_with_megatron, rf"found an object as {KEY}, expected a tensor"),
}


@every_case("name", RUNS_CODE)
def test_code_in_a_checkpoint_does_not_run(
    checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attack, marker = RUNS_CODE[name], tmp_path / "marker"
    attack.plant(checkpoint, marker)
    recompute_checksums(checkpoint)
    assert ran(marker, lambda: attack.works_on(checkpoint))
    model = adapted(2)
    before = values(model)
    with pytest.raises(CheckpointError, match=attack.refusal):
        dora_fx.load_checkpoint(model, checkpoint)
    with pytest.raises(CheckpointError, match=attack.refusal):
        read_adapters(checkpoint)
    assert main(["inspect", str(checkpoint)]) == 1
    assert str(checkpoint / METADATA) in capsys.readouterr().err
    assert are_equal(before, values(model))
    assert not marker.exists()


def test_code_in_the_common_file_does_not_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    (checkpoint / COMMON).write_bytes(saved({"extra": Payload(marker)}))
    recompute_checksums(checkpoint)
    # People set it to load checkpoints of before torch 2.6.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert ran(marker, lambda: dist_checkpointing.load_common_state_dict(str(checkpoint)))
    with pytest.raises(CheckpointError, match=r"common\.pt: found posix\.mkdir in it, expected numbers, text"):
        dora_fx.load_checkpoint(adapted(2), checkpoint)
    assert main(["inspect", str(checkpoint)]) == 1
    assert "found posix.mkdir in it" in capsys.readouterr().err
    assert not marker.exists()


def test_a_file_that_is_swapped_after_its_checksum(checkpoint: Path, tmp_path: Path) -> None:
    """The bytes that are loaded are those that were looked at, read once."""
    marker = tmp_path / "marker"
    whole, opened = (checkpoint / METADATA).read_bytes(), [0]

    def plant_at_the_second_opening(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(checkpoint / METADATA) and opened[0] < 2:
            opened[0] += 1
            if opened[0] == 2:
                planted = os.open(tmp_path / "planted", os.O_WRONLY | os.O_CREAT)
                os.write(planted, pickle.dumps(Payload(marker)))
                os.close(planted)
                os.replace(tmp_path / "planted", checkpoint / METADATA)

    sys.addaudithook(plant_at_the_second_opening)
    with pytest.raises(CheckpointError, match=r"\.metadata: found 'posix\.mkdir' in it"):
        dora_fx.load_checkpoint(adapted(2), checkpoint)
    assert opened == [2] and not marker.exists()
    (checkpoint / METADATA).write_bytes(whole)
    assert dora_fx.load_checkpoint(adapted(2), checkpoint) == {"step": 3}
