"""A checkpoint with planted files is refused on every rank, also where one rank alone reads what was planted."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Layout
from tests.distributed.test_checkpoint_rank_faults import model_with, refusals, values
from tests.unit.hostile_files import Payload, metadata_of, recompute_checksums, write_metadata


def load_what_was_planted(layout: Layout, folder: Path) -> None:
    path, marker = folder / "checkpoint", folder / "marker"
    dora_fx.save_checkpoint(model_with(" old"), path)
    new = model_with(" new")
    before = values(new)
    if dist.get_rank() == 0:
        data = path / "__1_0.distcp"
        data.write_bytes(bytes(data.stat().st_size))
        recompute_checksums(path)
    messages = refusals(lambda: dora_fx.load_checkpoint(new, path))
    assert all("__1_0.distcp" in message and "found no archive of torch.save" in message for message in messages)
    if dist.get_rank() == 0:
        metadata = metadata_of(path)
        metadata.planner_data = Payload(marker)
        write_metadata(path, metadata)
        recompute_checksums(path)
    messages = refusals(lambda: dora_fx.load_checkpoint(new, path))
    assert all("found 'posix.mkdir' in it" in message for message in messages)
    assert not marker.exists()
    torch.testing.assert_close(values(new), before, rtol=0, atol=0)


def test_every_rank_refuses(tmp_path: Path) -> None:
    visit_worlds([(load_what_was_planted, Layout(tp=2))], tmp_path)
