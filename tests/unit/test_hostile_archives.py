"""`common.pt` of somebody else: archives that torch would read, with more in them than plain data.

Beside it stands what torch makes of them without the check.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dora_fx
from dora_fx import CheckpointError
from dora_fx.app.cli.main import main
from tests.tables import every_case
from tests.unit.checkpoints import adapted
from tests.unit.hostile_files import COMMON, archive_with, compressed, is_endless, recompute_checksums, saved

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(adapted(1), path, extra={"step": 3})
    return path


def plant_common(checkpoint: Path, planted: bytes) -> str:
    (checkpoint / COMMON).write_bytes(planted)
    recompute_checksums(checkpoint)
    return str(checkpoint / COMMON)


def refused_common(checkpoint: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=message):
        dora_fx.load_checkpoint(adapted(2), checkpoint)
    assert main(["inspect", str(checkpoint)]) == 1
    assert COMMON in capsys.readouterr().err


def test_a_compressed_archive(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = compressed(saved({"extra": torch.zeros(1 << 22)}))
    path = plant_common(checkpoint, planted)
    assert torch.load(path, weights_only=True)["extra"].nbytes > 100 * len(planted)
    refused_common(checkpoint, r"common\.pt: found compressed records", capsys)


def test_a_number_that_takes_memory(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bytearray` is on torch's own list, and takes as many bytes as it is told."""
    planted = archive_with(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"\x85R.")
    path = plant_common(checkpoint, planted)
    assert is_endless("import sys, torch\npass\ntorch.load(sys.argv[1], weights_only=True)", path)
    refused_common(checkpoint, r"common\.pt: found builtins\.bytearray in it", capsys)


def test_what_megatron_adds_to_the_list_of_torch(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = archive_with(b"\x80\x02cargparse\nNamespace\n)R}X\x01\x00\x00\x00aK\x07sb.")
    path = plant_common(checkpoint, planted)
    assert torch.load(path, weights_only=True).a == 7
    refused_common(checkpoint, r"common\.pt: found argparse\.Namespace in it", capsys)


@every_case(
    ("planted", "message"),
    [
        (b"", "found no archive of torch.save"),
        (saved({})[:-30], "found no archive of torch.save"),
        (b"PK\3\4" + saved({}), "that torch.save did not write"),
        (saved({})[:-2] + b"\4\0more", "found no archive of torch.save"),
        (archive_with(b"\x80\x02]."), "found a list, expected a dict"),
        (archive_with(b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93."), "found the opcode SHORT_BINUNICODE in its pickle"),
        (archive_with(b"\x80\x02}q"), "found no whole pickle"),
        (archive_with(b"\x80\x02((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
                      b"\xff\xff\xff\x7ftQ.", **{"0": b"1234"}), "as the storage '0', expected the 4 bytes of"),
    ],
    ids=["empty", "cut", "front", "comment", "list", "opcode", "unfinished", "storage"],
)  # fmt: skip
def test_other_archives(checkpoint: Path, planted: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant_common(checkpoint, planted)
    refused_common(checkpoint, message, capsys)
