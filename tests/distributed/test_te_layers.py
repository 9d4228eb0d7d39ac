"""Layers over Transformer Engine, with emulated kernels, are the same function in every topology.

The machinery is that of `test_same_function_everywhere.py`: one rank, in float64, without the library's arithmetic.
While its adapter is on a layer calls none of Transformer Engine's kernels, so what is emulated does not enter.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.test_same_function_everywhere import compare
from tests.distributed.training import Mode
from tests.distributed.zoo import TE_LAYERS, Topology

pytestmark = pytest.mark.usefixtures("emulated_te")

slow = pytest.mark.slow
EAGER = Mode(num_steps=20)
COMPILED = Mode(compiler="dora_fx_aot_eager", num_steps=2)
DROPOUT = Mode(dropout=0.3, recompute=True, num_steps=2)
COMPILED_DROPOUT = Mode(compiler="dora_fx_aot_eager", dropout=0.3, recompute=True, num_steps=2)
CLIPPED = Mode(dtype=torch.float32, clip_grad=1.0, num_steps=2)
INDUCTOR = Mode(compiler="dora_fx_inductor", dtype=torch.float32, num_steps=2)
PLAIN_INDUCTOR = Mode(compiler="inductor", num_steps=2)
BFLOAT16 = Mode(dtype=torch.bfloat16)
EVERY_MODE = [EAGER, COMPILED, DROPOUT, COMPILED_DROPOUT, CLIPPED, BFLOAT16]

SAMPLE = ("te_norm_column_rms", "te_row_bias_added", "te_duplicated_bias_returned", "te_chain")
TOPOLOGIES = [
    pytest.param(Topology(tp=2), [Mode(num_steps=2)], SAMPLE),
    pytest.param(Topology(tp=2, sequence_parallel=True), [COMPILED_DROPOUT], SAMPLE),
    pytest.param(Topology(tp=1), EVERY_MODE, tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=2), EVERY_MODE, tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=2, sequence_parallel=True), EVERY_MODE, tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=2), [INDUCTOR, PLAIN_INDUCTOR], tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=2, sequence_parallel=True), [INDUCTOR, PLAIN_INDUCTOR], tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=2, sequence_parallel=True, dp=2), [COMPILED, CLIPPED], tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=4), EVERY_MODE, tuple(TE_LAYERS), marks=slow),
    pytest.param(Topology(tp=4, sequence_parallel=True), EVERY_MODE, tuple(TE_LAYERS), marks=slow),
]


def identify(value: object) -> str:
    return str(value) if isinstance(value, Topology) else f"{len(value)}"  # type: ignore[arg-type]


@pytest.mark.parametrize(("topology", "modes", "names"), TOPOLOGIES, ids=identify)
def test_equals_one_rank_emulated_kernels(topology, modes, names, record_error):
    compare(topology, modes, names, record_error)
