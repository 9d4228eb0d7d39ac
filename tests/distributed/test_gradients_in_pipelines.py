"""Gradients that are completed once per step within Megatron's pipeline schedules are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.closeness import assert_close, rounding
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import ROUNDINGS_OF_A_STEP, Kind, Layout, Training, unwrapped
from tests.distributed.zoo import sites_of

STEPS = 4
ONE, STAGES, INTERLEAVED = Layout(), Layout(tp=2, pp=2), Layout(tp=2, pp=2, vpp=2)
PLAIN, SP, DISTRIBUTED = Kind(), Kind(sequence_parallel=True), Kind(sequence_parallel=True, optimizer="distributed")

slow = pytest.mark.slow
CASES = [
    pytest.param(SP, [ONE, STAGES, INTERLEAVED], True, id="overlapped"),
    pytest.param(PLAIN, [ONE, STAGES, INTERLEAVED], False, marks=slow, id="one_after_the_other"),
    pytest.param(PLAIN, [ONE, Layout(tp=2, dp=2), Layout(tp=4)], True, marks=slow, id="without_stages"),
    # In bfloat16 only stages compute bit by bit what layers compute elsewhere.
    pytest.param(DISTRIBUTED, [Layout(tp=2), STAGES, INTERLEAVED], True, marks=slow, id="distributed_optimizer"),
]


def train(layout: Layout, kind: Kind, overlap_grad_reduce: bool, folder: Path) -> None:
    training = Training(layout, kind, overlap_grad_reduce=overlap_grad_reduce)
    losses = [training.train(number) for number in range(STEPS)]
    sites = [site for chunk in map(unwrapped, training.chunks) for site in sites_of(chunk).values()]
    partials = [partial for site in sites for partial in site._accumulators[:2] if partial is not None]
    assert len(partials) == (len(sites) if layout.tp > 1 else 0)
    assert all(partial._bucket is not None and partial.total is None for partial in partials)
    if dist.get_rank() == 0:
        torch.save(losses, folder / str(layout))


@pytest.mark.parametrize(("kind", "layouts", "overlap_grad_reduce"), CASES)
def test_losses_are_those_of_one_process(kind, layouts, overlap_grad_reduce, tmp_path):
    visit_worlds([(train, layout) for layout in layouts], kind, overlap_grad_reduce, tmp_path)
    expected, *others = (torch.tensor(torch.load(tmp_path / str(layout))) for layout in layouts)
    assert expected.max() - expected.min() > 0.1
    roundings = ROUNDINGS_OF_A_STEP * STEPS if kind.dtype is torch.float32 else 0
    for found in others:
        assert_close(found, expected, rounding(torch.float32, roundings))
