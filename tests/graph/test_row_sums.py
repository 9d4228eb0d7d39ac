"""Sums over tokens in compiled backward passes on a CPU: of sixteen rows first, where there are such."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from dora_fx.passes import default_passes
from dora_fx.passes.pipeline import run_passes
from tests.graph.sites import IN, adapted, column
from tests.graph.test_split_scale_pass import Cut, heads
from tests.models import randomize_adapters


@pytest.mark.parametrize(("sequence", "batch", "is_in_blocks"), [(8, 4, True), (16, 1, True), (6, 2, False)])
@pytest.mark.parametrize("is_cut", [False, True])
def test_gradients_of_magnitudes(tensor_parallel, sequence, batch, is_in_blocks, is_cut):
    tensor_parallel(1)
    model = (Cut(column(), heads) if is_cut else adapted(column())).double()
    randomize_adapters(model)
    sums: list[torch.Size] = []

    def note(gm: fx.GraphModule, _: Any) -> Any:
        nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
        sums.extend(node.args[0].meta["val"].shape for node in nodes)
        return make_boxed_func(gm)

    aot = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm), bw_compiler=note)
    compiled = torch.compile(
        model, backend=lambda gm, inputs: aot(run_passes(gm, inputs, default_passes()), inputs), fullgraph=True
    )
    x = torch.randn(sequence, batch, IN, dtype=torch.float64)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The eager call computes the norms, which the backend of this test does not.
    expected, found = (torch.autograd.grad(first(call(x)).square().sum(), parameters) for call in (model, compiled))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-13 * theirs.norm()
    rows = sequence * batch
    # Queries, keys and values of four groups, or the whole output.
    for features in [(4, 10), (4, 5), (4, 5)] if is_cut else [(80,)]:
        expected_sums = [(rows // 16, 16, *features), (rows // 16, *features)] if is_in_blocks else [(rows, *features)]
        for shape in expected_sums:
            assert shape in sums
            sums.remove(shape)


def first(output: Any) -> torch.Tensor:
    """Of a layer's output and its bias, or a cut output."""
    return output[0] if isinstance(output, tuple) else output
