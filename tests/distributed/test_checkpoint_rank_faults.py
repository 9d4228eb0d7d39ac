"""When one rank of a save or a load fails or dies, every rank raises, and the last good checkpoint stays."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base, set_adapter_values, trained_parameters

LAYOUT, KIND = Layout(tp=2), Kind()


def model_with(salt: str) -> list[Any]:
    chunks = attach(build_base(LAYOUT, KIND))
    set_adapter_values(chunks, LAYOUT, salt)
    return chunks


def values(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter, _ in trained_parameters(chunks)}


def at_open(name: str, act: Callable[[], None]) -> None:
    """Act before this process opens a file of that name, from now on; an error that it raises is open's."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(name) and armed:
            act()

    armed = [True]
    sys.addaudithook(hook)
    _disarm.append(armed.clear)


_disarm: list[Callable[[], None]] = []


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refusals(function: Callable[[], object]) -> list[str]:
    """The messages with which a call fails on every rank."""
    own = "no error"
    try:
        function()
    except CheckpointError as error:
        own = str(error)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, own)
    return messages


def one_rank_fails(layout: Layout, folder: Path) -> None:
    path = folder / "checkpoint"
    old, new = model_with(" old"), model_with(" new")
    dora_fx.save_checkpoint(old, path)
    # Rank 1 writes the one, and works out the checksum of the other; loading, it reads both.
    for name in ("__1_0.distcp", "common.pt"):
        if dist.get_rank() == 1:
            at_open(name, fail)
        messages = refusals(lambda: dora_fx.save_checkpoint(new, path))
        assert "rank 1" in messages[0]
        assert all("No space left on device" in message for message in messages)
        messages = refusals(lambda: dora_fx.load_checkpoint(new, path))
        assert all("No space left on device" in message for message in messages)
        while _disarm:
            _disarm.pop()()
        dora_fx.load_checkpoint(new, path)
        torch.testing.assert_close(values(new), values(old), rtol=0, atol=0)
        set_adapter_values(new, layout, " new")
    assert os.listdir(folder) == ["checkpoint"]


def copies_differ(layout: Layout, folder: Path) -> None:
    model, messages = model_with(""), []
    logger = logging.getLogger("dora_fx.checkpoint")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    dora_fx.save_checkpoint(model, folder / "checkpoint")
    assert messages == []
    [magnitude] = [value for name, value, _ in trained_parameters(model) if name.endswith("0.mlp.linear_fc2.magnitude")]
    with torch.no_grad():
        magnitude[3] += dist.get_rank() * 2**-20
    dora_fx.save_checkpoint(model, folder / "checkpoint")
    logger.removeHandler(handler)
    key = "decoder.layers.mlp.linear_fc2.adapter.weight_magnitude"
    saved = "found different values on ranks that should hold copies; saving the first rank's"
    expected = f"{folder / 'checkpoint'}: {key}: {saved}"
    assert messages == ([expected] if dist.get_rank() == 0 else [])


def test_one_rank_fails_and_ranks_that_drifted_apart(tmp_path: Path) -> None:
    visit_worlds([(copies_differ, LAYOUT), (one_rank_fails, LAYOUT)], tmp_path)


def save_and_die(rank: int, folder: Path, dying: int, at: str) -> None:
    """Save twice; a rank is killed in the second save, and the other leaves the message that it got."""
    torch.set_num_threads(1)
    path = folder / "checkpoint"
    with LAYOUT.world(rank, folder / "store"):
        dora_fx.save_checkpoint(model_with(" old"), path)
        if rank == dying:
            at_open(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            dora_fx.save_checkpoint(model_with(" new"), path)
        except CheckpointError as error:
            (folder / "message").write_text(str(error))
        os._exit(0)


def load_old_and_save(layout: Layout, folder: Path) -> None:
    path, model = folder / "checkpoint", model_with(" new")
    dora_fx.load_checkpoint(model, path)
    torch.testing.assert_close(values(model), values(model_with(" old")), rtol=0, atol=0)
    dora_fx.save_checkpoint(model, path)
    assert not [name for name in os.listdir(folder) if name.startswith(".checkpoint")]


@pytest.mark.slow
@pytest.mark.parametrize(("dying", "at"), [(1, "__1_0.distcp"), (0, "common.pt")], ids=["1", "0"])
def test_a_rank_dies(tmp_path: Path, dying: int, at: str) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=save_and_die, args=(rank, tmp_path, dying, at)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert ranks[dying].exitcode == -signal.SIGKILL
    assert ranks[1 - dying].exitcode == 0
    assert "another rank is gone" in (tmp_path / "message").read_text()
    visit_worlds([(load_old_and_save, LAYOUT)], tmp_path)
