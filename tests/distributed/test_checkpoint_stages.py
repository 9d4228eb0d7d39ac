"""Ranks without adapters, such as those of a pipeline stage that has none, save and load as all others do."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils import _pytree as pytree

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, Training
from tests.distributed.test_checkpoint_reshaping import assert_same_checkpoint, rest_of

KINDS = [Kind(), Kind(optimizer="bf16"), Kind(optimizer="distributed")]
# On two stages the last one has no adapters, or the first one, whose rank writes what is not sharded.
ADAPTED = ["*.layers.0.*", "*.layers.3.*"]


def save_trained(layout: Layout, folder: Path, _: list[Layout], targets: list[str]) -> None:
    for kind in KINDS:
        for adapted in targets:
            training = Training(layout, kind, targets=[adapted])
            for number in range(2):
                training.step(number)
            dora_fx.save_checkpoint(training.chunks, folder / f"adapters {kind} {adapted} {layout}")
            dora_fx.save_checkpoint(training.chunks, folder / f"{kind} {adapted} {layout}", training.optimizer)
            training.step(2)
            dora_fx.save_checkpoint(training.chunks, folder / f"gone on {kind} {adapted} {layout}", training.optimizer)


def load_and_go_on(layout: Layout, folder: Path, sources: list[Layout], targets: list[str]) -> None:
    for kind in KINDS:
        for adapted in targets:
            training = Training(layout, kind, salt=" of another run", targets=[adapted])
            for source in sources:
                dora_fx.load_checkpoint(training.chunks, folder / f"adapters {kind} {adapted} {source}")
                again = folder / f"adapters {kind} {adapted} {source} to {layout}"
                dora_fx.save_checkpoint(training.chunks, again)
                saved = folder / f"{kind} {adapted} {source}"
                dora_fx.load_checkpoint(training.chunks, saved, training.optimizer)
                training.step(2)
                again = folder / f"gone on {kind} {adapted} {source} to {layout}"
                dora_fx.save_checkpoint(training.chunks, again, training.optimizer)


def check(layouts: list[Layout], folder: Path, targets: list[str]) -> None:
    visits = [(step, layout) for step in (save_trained, load_and_go_on) for layout in layouts]
    visit_worlds(visits, folder, layouts, targets)
    for name in (f"{kind} {adapted}" for kind in KINDS for adapted in targets):
        reference = layouts[0]
        counted = rest_of(folder / f"gone on {name} {reference}")
        assert 3.0 in pytree.tree_leaves(counted), "the optimizer counts its steps"
        for source in layouts:
            assert_same_checkpoint(folder / f"{name} {source}", folder / f"{name} {reference}")
            for target in layouts:
                for when in ("adapters", "gone on"):
                    found = folder / f"{when} {name} {source} to {target}"
                    assert_same_checkpoint(found, folder / f"{when} {name} {reference}")


def test_a_stage_without_adapters(tmp_path: Path) -> None:
    check([Layout(), Layout(pp=2)], tmp_path, ADAPTED[1:])


@pytest.mark.slow
def test_stages_chunks_and_replicas_without_adapters(tmp_path: Path) -> None:
    check([Layout(), Layout(pp=2, vpp=2), Layout(pp=2, dp=2), Layout(tp=2, pp=2), Layout(dp=4)], tmp_path, ADAPTED)
