"""NaN in one rank's part of an adapter is refused by every rank, whichever stage or shard it lies in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base, set_adapter_values, trained_parameters

WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "save_checkpoint": dora_fx.save_checkpoint,
    "export_hf": dora_fx.export_hf,
    "iter_adapter": lambda chunks, _: dora_fx.iter_adapter(chunks),
    "iter_merged": lambda chunks, _: dora_fx.iter_merged(chunks),
    "merge": lambda chunks, _: dora_fx.merge(chunks),
}


def every_writer_refuses(layout: Layout, folder: Path) -> None:
    chunks = attach(build_base(layout, Kind()))
    set_adapter_values(chunks, layout, "")
    own = list(trained_parameters(chunks))
    # The last layer is the last stage's, the last rows of B the last tensor-parallel rank's.
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(value for name, value, _ in own if name.endswith("3.mlp.linear_fc1.lora_b"))[-1, 0] = math.nan
    for writer, write in WRITERS.items():
        own_message = None
        try:
            write(chunks, folder / "target")
        except (ValueError, CheckpointError) as error:
            own_message = str(error)
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, own_message)
        for message in messages:
            assert message is not None, f"{writer}: {messages}"
            assert "layers.3.mlp.linear_fc1.adapter.linear_out.weight: found NaN or inf" in message, message
        assert len(list(trained_parameters(chunks))) == len(own)
        assert os.listdir(folder) == sorted(path.name for path in folder.glob("[01]"))


def test_all_ranks_refuse_what_one_rank_holds(tmp_path: Path) -> None:
    visit_worlds([(every_writer_refuses, Layout(pp=2)), (every_writer_refuses, Layout(tp=2))], tmp_path)
