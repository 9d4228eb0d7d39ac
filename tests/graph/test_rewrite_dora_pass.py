"""What the DoRA rewrite does to a graph besides its golden text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_fx.ops import dora_linear
from dora_fx.passes.graph_utils import subgraph_modules
from dora_fx.passes.rewrite_dora_pass import rewrite_dora_pass
from tests.graph.capture import SEQUENCE, capture
from tests.graph.sites import IN, OneLinear, adapted, column, row
from tests.recording_backend import RecordingBackend


@pytest.fixture(autouse=True)
def one_rank(tensor_parallel):
    tensor_parallel(1)


def test_no_site_returns_the_same_graph_untouched():
    gm = capture(OneLinear(column()), IN).before[0]
    before = gm.code
    assert rewrite_dora_pass(gm, ()) is gm
    assert gm.code == before


def test_idempotent():
    gm = capture(adapted(row()), IN).after[0]
    before = gm.code
    assert rewrite_dora_pass(gm, ()).code == before


@pytest.mark.parametrize("recompute", [False, True])
def test_marker_is_gone_and_new_nodes_are_described(recompute):
    gm = capture(adapted(column(bias=True, skip_bias_add=False)), IN, recompute=recompute).after[0]
    nodes = [node for module in subgraph_modules(gm) for node in module.graph.nodes if node.op == "call_function"]
    assert dora_linear not in {node.target for node in nodes}
    products = [node for node in nodes if node.target is torch._C._nn.linear]
    assert len(products) == 3
    for node in products:
        assert "OneLinear" in str(node.meta["nn_module_stack"]) or "DoRALinear" in str(node.meta["nn_module_stack"])
        assert "layers.py" in node.meta["stack_trace"]
        assert isinstance(node.meta["example_value"], torch.Tensor)


def test_unmarked_neighbour_is_left_alone():
    model = nn.Sequential(adapted(column()), nn.Flatten(0, 0), nn.Identity())
    plain = nn.Linear(80, 3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model[0], plain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[0])

    backend = capture(Both(), IN)
    text = backend.after[0].code
    assert text.count("l_self_modules_second_parameters_weight_") == backend.before[0].code.count(
        "l_self_modules_second_parameters_weight_"
    )


def test_sequence_lengths_share_a_graph():
    backend = RecordingBackend()
    compiled = torch.compile(adapted(column()), backend=backend, fullgraph=True)
    for sequence in range(SEQUENCE, SEQUENCE + 8):
        compiled(torch.randn(sequence, 2, IN))
    # One for the first length, one for every other.
    assert len(backend.after) == 2
