"""Training that goes on after a change of layout goes through the losses of training that did not stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, Training

STEPS = 4
TARGETS = [Layout(tp=2), Layout(dp=2)]


def train_and_save(layout: Layout, kind: Kind, folder: Path) -> None:
    training = Training(layout, kind)
    for number in range(STEPS):
        training.train(number)
    dora_fx.save_checkpoint(training.chunks, folder / "checkpoint", training.optimizer, extra=STEPS)
    go_on(layout, training, STEPS, folder)


def load_and_go_on(layout: Layout, kind: Kind, folder: Path) -> None:
    training = Training(layout, kind, salt=" of another run")
    start = dora_fx.load_checkpoint(training.chunks, folder / "checkpoint", training.optimizer)
    go_on(layout, training, start, folder)


def go_on(layout: Layout, training: Training, start: int, folder: Path) -> None:
    losses = [training.train(number) for number in range(start, start + STEPS)]
    if dist.get_rank() == 0:
        torch.save(losses, folder / f"losses {layout}")


@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_a_change_of_layout(sequence_parallel: bool, tmp_path: Path) -> None:
    kind = Kind(sequence_parallel=sequence_parallel)
    visits = [(train_and_save, Layout()), *((load_and_go_on, layout) for layout in TARGETS)]
    visit_worlds(visits, kind, tmp_path)
    expected = torch.load(tmp_path / "losses tp1-pp1-dp1")
    assert max(expected) - min(expected) > 1e-3
    for layout in TARGETS:
        torch.testing.assert_close(torch.load(tmp_path / f"losses {layout}"), expected, rtol=2e-6, atol=0)
