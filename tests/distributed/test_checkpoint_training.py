"""Training that changes its layout again and again goes through the losses of training that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dora_fx
from tests.closeness import assert_close, rounding
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import ROUNDINGS_OF_A_STEP, Kind, Layout, Training

STEPS = 3
ONE = Layout()
TWO_RANKS = [ONE, Layout(pp=2), Layout(tp=2), Layout(pp=2, vpp=2), Layout(dp=2), ONE]
FOUR_RANKS = [ONE, Layout(tp=2, pp=2), Layout(pp=4), Layout(tp=2, dp=2), Layout(pp=2, dp=2), Layout(tp=4)]
# A pipeline's stages compute what its layers compute elsewhere, bit by bit.
PIPELINES = [
    [ONE, Layout(pp=2), Layout(pp=2, vpp=2), Layout(pp=4), ONE],
    [Layout(tp=2), Layout(tp=2, pp=2), Layout(tp=2)],
    [Layout(dp=2), Layout(pp=2, dp=2), Layout(dp=2)],
]

FP32, BF16, DISTRIBUTED = Kind(sequence_parallel=True), Kind(True, True, "bf16"), Kind(True, True, "distributed")


def never_stop(layout: Layout, kind: Kind, folder: Path, num_layouts: int) -> None:
    training = Training(layout, kind)
    losses = [training.train(number) for number in range(STEPS * num_layouts)]
    if dist.get_rank() == 0:
        torch.save(losses, folder / "expected")


def go_on(layout: Layout, kind: Kind, folder: Path, num_layouts: int) -> None:
    """Start, or go on where the visit before this one stopped, and stop after a few steps."""
    start, losses = 0, []
    # What is not loaded shows: a new start has other values than the run.
    training = Training(layout, kind, salt=" of another run" if (folder / "checkpoint").exists() else "")
    if (folder / "checkpoint").exists():
        start, losses = dora_fx.load_checkpoint(training.chunks, folder / "checkpoint", training.optimizer)
    losses = losses + [training.train(number) for number in range(start, start + STEPS)]
    extra = [start + STEPS, losses]
    dora_fx.save_checkpoint(training.chunks, folder / "checkpoint", training.optimizer, extra=extra)
    if dist.get_rank() == 0:
        torch.save(losses, folder / "found")


CASES = [
    pytest.param(FP32, TWO_RANKS, True, id="two_ranks"),
    pytest.param(Kind(), TWO_RANKS, True, id="two_ranks-no_sequence_parallel", marks=pytest.mark.slow),
    pytest.param(FP32, FOUR_RANKS, True, id="four_ranks", marks=pytest.mark.slow),
]
CASES += [
    pytest.param(kind, layouts, False, id=f"pipelines-{kind}-{layouts[0]}", marks=pytest.mark.slow)
    for kind in (FP32, BF16, DISTRIBUTED)
    for layouts in PIPELINES
]


@pytest.mark.parametrize(("kind", "layouts", "rounds_otherwise"), CASES)
def test_losses_do_not_depend_on_changes_of_layout(
    kind: Kind, layouts: list[Layout], rounds_otherwise: bool, tmp_path: Path
) -> None:
    visits = [(never_stop, layouts[0]), *((go_on, layout) for layout in layouts)]
    visit_worlds(visits, kind, tmp_path, len(layouts))
    expected, found = (torch.tensor(torch.load(tmp_path / name)) for name in ("expected", "found"))
    assert expected.max() - expected.min() > 0.1
    print(f"largest relative difference of {len(expected)} losses: {((found - expected) / expected).abs().max():.1e}")
    roundings = ROUNDINGS_OF_A_STEP * len(expected) if rounds_otherwise else 0
    assert_close(found, expected, rounding(torch.float32, roundings))
