"""What the DoRA rewrite does to a graph besides its golden text."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from dora_fx.modules.marker import dora_linear
from dora_fx.passes.graph_utils import subgraph_modules
from dora_fx.passes.rewrite_dora_pass import rewrite_dora_pass
from tests.graph.capture import SEQUENCE, capture
from tests.graph.sites import IN, OUT, OneLinear, adapted, column, row
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
        assert "linear_wrapper.py" in node.meta["stack_trace"]
        assert isinstance(node.meta["example_value"], torch.Tensor)


class Neighbours(nn.Module):
    """An adapted layer between two that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.adapted, self.last = nn.Linear(IN, IN), adapted(column()), nn.Linear(OUT, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.adapted(self.first(x))[0])


def linears_by_weight(gm: fx.GraphModule) -> dict[str, fx.Node]:
    nodes = gm.graph.find_nodes(op="call_function", target=torch._C._nn.linear)
    return {str(node.args[1]): node for node in nodes}


def test_unmarked_neighbours_are_left_alone():
    backend = capture(Neighbours(), IN)
    before, after = linears_by_weight(backend.before[0]), linears_by_weight(backend.after[0])
    assert [name.split("_modules_")[1].split("_")[0] for name in before] == ["first", "last"]
    assert len(after) == len(before) + 3
    for name, node in before.items():
        found = after[name]
        assert (found.name, str(found.args[1:]), found.kwargs) == (node.name, str(node.args[1:]), node.kwargs)
        assert found.meta.keys() == node.meta.keys()
        assert found.meta["stack_trace"] == node.meta["stack_trace"]
    first, last = before
    assert str(after[first].args[0]) == str(before[first].args[0])
    assert before[last].args[0].target is dora_linear
    assert after[last].args[0].name not in {node.name for node in backend.before[0].graph.nodes}


def test_sequence_lengths_share_a_graph():
    backend = RecordingBackend()
    compiled = torch.compile(adapted(column()), backend=backend, fullgraph=True)
    for sequence in range(SEQUENCE, SEQUENCE + 8):
        compiled(torch.randn(sequence, 2, IN))
    # One for the first length, one for every other.
    assert len(backend.after) == 2
