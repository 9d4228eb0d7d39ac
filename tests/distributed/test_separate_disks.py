"""Nodes that share no folder, and what one rank alone cannot read: every rank says so, and none waits for another."""

from __future__ import annotations

import os
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.finetune_ranks import finetune
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base, set_adapter_values
from tests.finetune_runs import step_of
from tests.hf_models import finetune_inputs
from tests.separate_disks import mount_own_disk, skip_without_own_disks

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    options = ["--compile", "none", "--dp", 2, "--gradient-accumulation", 2, "--sample-tokens", 0, "--steps", 2]
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), *options)


def messages_of_ranks(call: Any) -> list[str]:
    own = "no error"
    try:
        call()
    except CheckpointError as error:
        own = str(error)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, own)
    return messages


def save_and_load_with_own_disks(layout: Layout, folder: Path) -> None:
    chunks = attach(build_base(layout, Kind()))
    set_adapter_values(chunks, layout, "")
    own, path = folder / "own", folder / "own" / "checkpoint"
    dora_fx.save_checkpoint(chunks, folder / "another")
    dora_fx.save_checkpoint(chunks, path)
    if dist.get_rank() == 1:
        mount_own_disk(own)
    before = sorted(os.listdir(own))
    for messages, expected in (
        (messages_of_ranks(lambda: dora_fx.save_checkpoint(chunks, path)), f"in {own}, which rank 0 has just made"),
        (messages_of_ranks(lambda: dora_fx.load_checkpoint(chunks, path)), f"{path / 'dora_fx.json'}: cannot be read"),
    ):
        assert all(f"{HOST} does not see" in message and expected in message for message in messages), messages
    if dist.get_rank() == 1:
        assert os.listdir(own) == before == []
        shutil.copytree(folder / "another", path)
    dist.barrier()
    for message in messages_of_ranks(lambda: dora_fx.load_checkpoint(chunks, path)):
        assert f"{HOST} does not see the checkpoint that rank 0 sees: {path} is another checkpoint" in message
    if dist.get_rank() == 0:
        assert os.listdir(own) == ["checkpoint"]
        assert {path.name for path in folder.iterdir()} == {"own", "another"}


def test_checkpoints_are_saved_and_loaded_on_one_disk(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    skip_without_own_disks(tmp_path / "own")
    visit_worlds([(save_and_load_with_own_disks, Layout(dp=2))], tmp_path)


def own_disk_of_rank_1(folder: Path, copied: Path | None, rank: int) -> None:
    if rank == 1:
        mount_own_disk(folder)
        if copied is not None:
            shutil.copytree(copied, folder / "run")


def test_a_run_needs_a_folder_that_all_ranks_share(inputs: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    skip_without_own_disks(own)
    text = finetune(2, *inputs, "--run", own / "run", prepare=partial(own_disk_of_rank_1, own, None), expect=2)
    assert text.count(f"error: --run {own / 'run'}: {HOST} does not see") == 2
    assert f"(on rank 1, {HOST})" in text and "step 1" not in text
    assert os.listdir(own) == []
    finetune(2, *inputs, "--run", own / "run")
    lacking = partial(own_disk_of_rank_1, own, None)
    text = finetune(2, "--resume", own / "run", "--steps", 3, prepare=lacking, expect=2)
    assert (
        f"error: --resume {own / 'run'}: there is no config.yaml, expected the folder of a saved run (on rank 1" in text
    )
    shutil.copytree(own / "run", tmp_path / "copy")
    copied = partial(own_disk_of_rank_1, own, tmp_path / "copy")
    text = finetune(2, "--resume", own / "run", "--steps", 3, prepare=copied, expect=2)
    assert text.count(f"error: --resume {own / 'run'}: {HOST} does not see") == 2
    assert step_of(own / "run") == 2 and not list((own / "run").glob(".*"))


@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps?"),
        pytest.param(["--lr", "0"], "--lr: found 0.0, expected a positive number", marks=pytest.mark.slow),
        pytest.param(["--data", "/nowhere.txt"], "--data: found /nowhere.txt, but ", marks=pytest.mark.slow),
        (["--base", "/nowhere"], "--base: found /nowhere, but "),
        pytest.param(
            ["--sequence-length", "1000"],
            "--sequence-length: found 1000, expected at most 128",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_one_rank_cannot_do_all_ranks_say(
    of_rank_1: list[str], message: str, inputs: list[str], tmp_path: Path
) -> None:
    text = finetune(2, *inputs, "--run", tmp_path / "run", of_rank_1=of_rank_1, expect=2)
    assert text.count(message) == 2 and text.count(f"(on rank 1, {HOST})") == 1, text
    assert "Traceback" not in text and not (tmp_path / "run").exists()
