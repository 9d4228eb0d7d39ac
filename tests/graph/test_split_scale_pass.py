"""The scale of an output that is cut moves behind the cut, and no other does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora_fx.function.row_scale import scale_rows
from dora_fx.passes import default_passes
from dora_fx.passes.rewrite_dora_pass import rewrite_dora_pass
from dora_fx.passes.split_scale_pass import find_split_scales, split_scale_pass
from tests.graph.capture import capture
from tests.graph.sites import IN, OneLinear, adapted, column
from tests.models import randomize_adapters
from tests.recording_backend import RecordingBackend


class Cut(nn.Module):
    """An adapted layer whose output is cut by a function."""

    def __init__(self, linear: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.cut = adapted(linear).linear, cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        returned = self.linear(x)
        return self.cut(returned[0] if isinstance(returned, tuple) else returned)


def gate(y: torch.Tensor) -> torch.Tensor:
    gate, up = torch.chunk(y, 2, dim=-1)
    return F.silu(gate) * up


def heads(y: torch.Tensor) -> torch.Tensor:
    """Cut as Megatron's attention cuts its queries, keys and values."""
    mixed = y.view(*y.size()[:-1], 4, 20)
    query, key, value = torch.split(mixed, [10, 5, 5], dim=3)
    return torch.cat((query.reshape(*y.size()[:-1], -1, 5).sum(2), key.square().sum(2), value.tanh().sum(2)), -1)


CUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Megatron's": gate,
    "attention's": heads,
    "by position": lambda y: torch.mul(*torch.chunk(y, 2, -1)),
    "five parts": lambda y: torch.stack(y.chunk(5, -1)).sum(0),
    "one part unused": lambda y: y.chunk(2, dim=-1)[1],
    "unequal parts": lambda y: torch.cat(tuple(part.tanh() for part in y.chunk(3, -1)), -1),
    "a size": lambda y: torch.mul(*y.split(40, -1)),
    "two views": lambda y: torch.mul(*y.reshape(-1, 80).view(6, 2, 8, 10).split((5, 5), dim=-1)),
}
LEFT_ALONE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "used elsewhere too": lambda y: F.silu(y.chunk(2, 2)[0]) * y.sum(),
    "cut along tokens": lambda y: torch.mul(*y.chunk(2, 0)),
    "cut along groups": lambda y: torch.mul(*y.view(6, 2, 4, 20).chunk(2, 2)),
    "viewed with its tokens": lambda y: torch.mul(*y.view(6, 4, 40).chunk(2, -1)),
    "a view that is used elsewhere too": lambda y: torch.mul(*(v := y.view(6, 2, 4, 20)).chunk(2, -1)) + v.sum(),
    "the shape of a view": lambda y: torch.mul(*torch.ones(960).view_as(y).chunk(2, -1)),
    "read as integers": lambda y: torch.mul(*y.view(torch.int32).chunk(2, -1)),
    "not cut": torch.tanh,
}


@pytest.fixture(autouse=True)
def one_rank(tensor_parallel):
    tensor_parallel(1)


@pytest.mark.parametrize(
    ("name", "features", "sizes"),
    [
        ("Megatron's", (80,), (40, 40)),
        ("attention's", (4, 20), (10, 5, 5)),
        ("by position", (80,), (40, 40)),
        ("five parts", (80,), (16,) * 5),
        ("one part unused", (80,), (40, 40)),
        ("unequal parts", (80,), (27, 27, 26)),
        ("a size", (80,), (40, 40)),
        ("two views", (8, 10), (5, 5)),
    ],
)
def test_finder_and_numbers(name, features, sizes):
    torch.manual_seed(0)
    model = Cut(column(), CUTS[name]).double()
    randomize_adapters(model)
    backend = RecordingBackend([rewrite_dora_pass])
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(6, 2, IN, dtype=torch.float64))
    [gm] = backend.after
    [split] = find_split_scales(gm)
    assert split.scale.target is scale_rows
    assert (split.features, split.sizes) == (features, sizes)
    assert {part for _, part in split.parts} == ({1} if name == "one part unused" else set(range(len(sizes))))
    torch._dynamo.reset()

    def results(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        x = torch.randn(6, 2, IN, dtype=torch.float64, requires_grad=True)
        y = call(x)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]

    backend = RecordingBackend()
    for found, expected in zip(
        results(torch.compile(model, backend=backend, fullgraph=True)), results(model), strict=True
    ):
        assert (found - expected).norm() <= 1e-13 * expected.norm()
    assert find_split_scales(backend.after[0]) == []


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name):
    has_gradient = name not in ("the shape of a view", "read as integers")
    [gm] = capture(Cut(column(), LEFT_ALONE[name]), IN, grad=has_gradient).after
    before = gm.code
    assert find_split_scales(gm) == []
    assert split_scale_pass(gm, ()) is gm
    assert gm.code == before


def test_parts_that_are_no_numbers_are_left_alone():
    backend = RecordingBackend([rewrite_dora_pass])
    torch.compile(Cut(column(), gate), backend=backend, fullgraph=True)(torch.randn(6, 2, IN))
    [gm] = backend.after
    [split] = find_split_scales(gm)
    (node, part), *_ = split.parts
    for index in (slice(0, 1), "0", None):
        node.args = (split.cut, index)
        assert find_split_scales(gm) == []
    node.args = (split.cut, part - len(split.sizes))
    [again] = find_split_scales(gm)
    assert set(again.parts) == set(split.parts)


def test_an_output_with_a_bias_is_left_alone():
    [gm] = capture(Cut(column(bias=True, skip_bias_add=False), gate), IN).after
    assert find_split_scales(gm) == []


def test_in_a_checkpointed_region():
    [gm] = capture(Cut(column(), gate), IN, recompute=True).after
    assert find_split_scales(gm) == []
    bodies = [child for child in gm.children() if len(child.graph.find_nodes(op="call_function", target=scale_rows))]
    assert [len(body.graph.find_nodes(op="call_function", target=scale_rows)) for body in bodies] == [2]


def test_no_site_returns_the_same_graph_untouched():
    gm = capture(OneLinear(column()), IN).before[0]
    before = gm.code
    assert split_scale_pass(gm, ()) is gm
    assert gm.code == before


def test_the_pass_runs_by_default():
    assert default_passes()[-1] is split_scale_pass
