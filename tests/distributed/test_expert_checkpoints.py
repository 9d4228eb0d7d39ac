"""A checkpoint of experts saved at one layout and loaded at another holds the same bits, optimizer state included."""

from __future__ import annotations

from pathlib import Path

import pytest

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, Training
from tests.distributed.test_checkpoint_reshaping import assert_same_checkpoint, reshape
from tests.distributed.test_checkpoint_torch_optimizer_ranks import Training as TorchTraining

LAYOUTS = [
    Layout(),
    Layout(dp=2, ep=2),
    Layout(tp=2, etp=1),
    Layout(tp=2, ep=2, etp=1),
    Layout(pp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=4, etp=1),
]
KINDS = [Kind(experts=True, sequence_parallel=True, optimizer=name) for name in ("fp32", "bf16", "distributed")]


def test_few_layouts(tmp_path: Path) -> None:
    assert reshape([Layout(tp=2), *LAYOUTS[1:4:2]], KINDS[:1], tmp_path) == 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_pair_of_layouts(kind: Kind, tmp_path: Path) -> None:
    assert reshape(LAYOUTS, [kind], tmp_path) == 49


def save_with_torchs(layout: Layout, folder: Path) -> None:
    training = TorchTraining(layout, KINDS[0], "adamw")
    for number in range(2):
        training.step(number)
    dora_fx.save_checkpoint(training.chunks, folder / str(layout), training.optimizer)


def load_with_torchs(layout: Layout, folder: Path) -> None:
    training = TorchTraining(layout, KINDS[0], "adamw", " of another run")
    dora_fx.load_checkpoint(training.chunks, folder / str(LAYOUTS[1]), training.optimizer)
    dora_fx.save_checkpoint(training.chunks, folder / f"again {layout}", training.optimizer)


def test_state_of_torchs_optimizers(tmp_path: Path) -> None:
    others = [LAYOUTS[3], Layout(tp=2)]
    visit_worlds([(save_with_torchs, LAYOUTS[1]), *((load_with_torchs, layout) for layout in others)], tmp_path)
    for layout in others:
        assert_same_checkpoint(tmp_path / f"again {layout}", tmp_path / str(LAYOUTS[1]))


def experts_alone(layout: Layout, folder: Path, kind: Kind) -> None:
    for targets in (["*.local_experts.*"], ["*.shared_experts.*"]):
        training = Training(layout, kind, targets=targets)
        training.step(0)
        place = folder / f"{targets[0][2]} {layout}"
        dora_fx.save_checkpoint(training.chunks, place, training.optimizer)
        training.step(1)
        dora_fx.load_checkpoint(training.chunks, place, training.optimizer)
        training.step(2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapters_of_experts_alone(kind: Kind, tmp_path: Path) -> None:
    visit_worlds([(experts_alone, LAYOUTS[1])], tmp_path, kind)
