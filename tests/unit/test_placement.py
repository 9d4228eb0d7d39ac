"""The layout table: which layer has which layout, how a tensor is cut, and what Megatron's optimizer is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_fx import ParallelLinearDoRAAdapter
from dora_fx.function.placement import LAYOUTS, shard
from dora_fx.modules.kinds import describe_linear
from tests.models import LINEAR_KINDS, column, config, row
from tests.tables import every_case


@every_case(
    ("kind", "layout"),
    [
        ("column", "column"),
        ("column_bias_added", "column"),
        ("column_gather_output", "column_gather_output"),
        ("row", "row"),
        ("row_bias_returned", "row"),
        ("row_split_input", "row_split_input"),
        ("linear_bias", "replicated"),
        ("output_layer", "column"),
    ],
)
def test_layout_of_a_layer(kind: str, layout: str, world: None) -> None:
    assert describe_linear("layer", LINEAR_KINDS[kind]()).layout.name == layout


@pytest.mark.parametrize(("build", "layout"), [(column, "column_sequence_parallel"), (row, "row_sequence_parallel")])
def test_layout_of_a_sequence_parallel_layer(build, layout: str, world: None) -> None:
    layer = build(config=config())
    # Megatron switches it off again in a world of one rank.
    layer.sequence_parallel = True
    assert describe_linear("layer", layer).layout.name == layout


def test_subclass_has_no_layout() -> None:
    class Doubled(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"^layer: .*Doubled has no DoRA layout; supported are"):
        describe_linear("layer", Doubled(2, 2))


@every_case("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shapes_of_a_layout_multiply(layout) -> None:
    """With factors gathered as the table says, every rank's product has the shape of its base product."""
    tp_size, in_features, out_features, dim = 4, 24, 40, 8
    weight = shard(torch.zeros(out_features, in_features), layout.weight_shard_dim, 0, tp_size)
    lora_a = shard(torch.zeros(dim, in_features), layout.lora_a_shard_dim, 0, tp_size)
    lora_b = shard(torch.zeros(out_features, dim), layout.lora_b_shard_dim, 0, tp_size)
    magnitude = shard(torch.zeros(out_features), layout.magnitude_shard_dim, 0, tp_size)
    a_rows = lora_a.shape[0] * (tp_size if layout.gathers_lora_a else 1)
    b_rows = lora_b.shape[0] * (tp_size if layout.gathers_lora_b else 1)
    assert (a_rows, lora_a.shape[1]) == (dim, weight.shape[1])
    assert (b_rows, lora_b.shape[1]) == (weight.shape[0], dim)
    assert magnitude.shape[0] == weight.shape[0]
    assert layout.shards_input_features == (weight.shape[1] < in_features)


@every_case(("dim", "blocks"), [(0, 1), (1, 1), (0, 2), (0, 3)])
def test_shards_join_to_the_whole(dim: int, blocks: int) -> None:
    whole = torch.arange(24 * 24).view(24, 24)
    parts = [shard(whole, dim, tp_rank, 4, blocks) for tp_rank in range(4)]
    joined = [torch.cat([part.chunk(blocks, dim)[block] for part in parts], dim) for block in range(blocks)]
    assert torch.equal(torch.cat(joined, dim), whole)
    assert {part.shape[dim] for part in parts} == {6}


def test_gated_shard_holds_gate_and_up_rows() -> None:
    rows = torch.arange(8)
    assert shard(rows, 0, 1, 2, blocks=2).tolist() == [2, 3, 6, 7]
    assert shard(rows, 0, 1, 2).tolist() == [4, 5, 6, 7]


def test_a_tensor_that_does_not_divide_is_not_cut() -> None:
    rows = torch.arange(10)
    assert shard(rows, None, 1, 4).tolist() == rows.tolist()
    for tp_size, blocks in ((4, 1), (2, 2), (1, 3), (20, 1)):
        with pytest.raises(ValueError, match=rf"found a tensor of shape \(10,\), .* multiple of {tp_size * blocks} in"):
            shard(rows, 0, 0, tp_size, blocks)


def test_shard_is_a_copy() -> None:
    whole = torch.zeros(4, 4)
    for dim in (None, 0, 1):
        shard(whole, dim, 0, 2).fill_(1.0)
    assert not whole.any()


@every_case(
    ("layout", "partition_dims"),
    [
        ("replicated", (None, None, None)),
        ("column", (0, 0, 0)),
        ("column_sequence_parallel", (0, 0, 0)),
        ("row", (1, 0, None)),
        ("row_sequence_parallel", (1, 0, None)),
    ],
)
def test_parameters_tell_megatron_how_they_are_sharded(layout: str, partition_dims: tuple[int | None, ...]) -> None:
    adapter = ParallelLinearDoRAAdapter(24, 40, 8, layout_name=layout, row_blocks=2)
    adapter.init_weight_magnitude(torch.ones(40))
    parameters = (adapter.linear_in.weight, adapter.linear_out.weight, adapter.weight_magnitude)
    for parameter, dim, stride in zip(parameters, partition_dims, (1, 2, 2), strict=True):
        assert getattr(parameter, "tensor_model_parallel", False) == (dim is not None)
        assert getattr(parameter, "partition_dim", None) == dim
        assert getattr(parameter, "partition_stride", None) == (None if dim is None else stride)
        assert not hasattr(parameter, "sequence_parallel")
