"""Experts over Transformer Engine, a module each, with emulated kernels: the function of one rank at every topology."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import assert_close
from tests.distributed.launch import run_layout
from tests.distributed.moe_layers import MODES, ExpertLayout, Results, bound_of_step, oracle_step
from tests.distributed.test_experts import run_mode

pytestmark = pytest.mark.usefixtures("emulated_te")
slow = pytest.mark.slow


def run(layout: ExpertLayout) -> dict[tuple[str, torch.dtype], list[Results]]:
    return {mode: run_mode(layout, *mode, "te") for mode in MODES}


@pytest.mark.parametrize(
    "layout",
    [
        ExpertLayout(2, tp=2, etp=2),
        pytest.param(ExpertLayout(), marks=slow),
        pytest.param(ExpertLayout(2, ep=2), marks=slow),
        pytest.param(ExpertLayout(2, tp=2, ep=2), marks=slow),
        pytest.param(ExpertLayout(2, tp=2), marks=slow),
        pytest.param(ExpertLayout(4, tp=2, ep=2, etp=2), marks=slow),
    ],
    ids=str,
)
def test_every_topology_computes_the_function_of_one_rank_emulated_kernels(layout: ExpertLayout) -> None:
    for (_, dtype), steps in run_layout(run, layout).items():
        for number, found in enumerate(steps):
            assert_close(found, oracle_step(number), bound_of_step(dtype))
