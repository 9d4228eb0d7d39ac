"""NaN on one rank, in its part of an adapter or of a gradient, is refused by all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.finetune_ranks import finetune
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base, set_adapter_values, trained_parameters
from tests.finetune_runs import rows, step_of
from tests.hf_models import SHAPE, adapter_of, finetune_inputs
from tests.planted_nan import planted_nan

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


_planted = ExitStack()


def plant_on_rank_1(input_size: int, first_call: int, rank: int) -> None:
    """Plant NaN in rank 1's gradients from a call on, for as long as the process lives.

    The hook is on every rank: a layer with hooks is called in another way, by all ranks or by none.
    """
    _planted.enter_context(planted_nan("gradient", lambda call: rank == 1 and call >= first_call, input_size))


@pytest.mark.parametrize(
    ("size", "shards", "passes"),
    [
        pytest.param("--tp", 2, 4, marks=pytest.mark.slow),
        ("--pp", 1, 4),
        pytest.param("--dp", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_skip_the_step_of_one(size: str, shards: int, passes: int, tmp_path: Path) -> None:
    """`shards` is how often the layer's input is sharded, `passes` what a rank has in a step."""
    options = ["--compile", "none", "--gradient-accumulation", 4, "--sample-tokens", 0, "--eval-every", 0, size, 2]
    inputs = finetune_inputs(tmp_path, *options)
    good, run = tmp_path / "good", tmp_path / "run"
    plant_from = partial(partial, plant_on_rank_1, SHAPE["intermediate_size"] // shards)
    finetune(2, *inputs, "--steps", 2, "--run", good, prepare=plant_from(3 * passes))
    plant = plant_from(2 * passes + 1)
    text = finetune(2, *inputs, "--steps", 20, "--run", run, prepare=plant, expect=2)
    assert text.count("the 3 steps up to step 5 made no update") == 2 and "Traceback" not in text
    message = "step 3 made no update: the gradient of decoder.layers.1.mlp.linear_fc2.adapter"
    assert text.count(message) == 1
    assert step_of(run) == 2
    torch.testing.assert_close(adapter_of(run), adapter_of(good), rtol=0, atol=0)
    finetune(2, "--resume", run, "--steps", 3)
    assert list(rows(run)) == [1, 2, 3]
