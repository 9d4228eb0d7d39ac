"""Process groups and layouts that a site cannot work with are refused by name, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

import dora_fx
from tests.graph.conftest import fake_world
from tests.graph.sites import DIM, IN, OUT, OneLinear, adapted, column, config, row


def refuse(linear: nn.Module, error: type[Exception], message: str, dim: int = DIM) -> None:
    """Attaching raises, and leaves the layer as it was."""
    model = OneLinear(linear)
    with pytest.raises(error, match=message):
        dora_fx.DoRA(["linear"], dim=dim)(model)
    assert model.linear is linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("inner_compiler", [None, "eager"])
def test_a_call_after_the_group_was_destroyed(inner_compiler):
    with fake_world(2):
        model: Any = adapted(row(tensor_model_parallel_size=2))
        group = model.linear.adapter.tp_group
    if inner_compiler is not None:
        model = torch.compile(model, backend="dora_fx", options={"inner_compiler": inner_compiler})
    with pytest.raises(RuntimeError, match=f"found no tensor-parallel process group '{group}'.* was it destroyed"):
        model(torch.randn(3, 1, IN // 2))


@pytest.mark.parametrize("layer", [column, row])
def test_attaching_after_the_group_was_destroyed(layer):
    with fake_world(2):
        linear = layer(tensor_model_parallel_size=2)
    refuse(linear, RuntimeError, "found no tensor-parallel process group .* was it destroyed")


@pytest.mark.parametrize("layer", [column, row])
def test_a_layer_that_was_built_without_model_parallel_groups(layer):
    refuse(layer(), ValueError, r"linear: .* without a tensor-parallel group, expected .*initialize_model_parallel\(\)")


def test_a_dim_that_does_not_divide_by_the_ranks_that_share_a(tensor_parallel):
    tensor_parallel(4)
    message = "linear: dim 18 is sharded over 4 tensor-parallel ranks, expected a multiple of 4"
    refuse(column(tensor_model_parallel_size=4), ValueError, message, dim=18)


def test_a_row_layer_takes_any_dim(tensor_parallel):
    tensor_parallel(4)
    model = dora_fx.DoRA(["linear"], dim=18)(OneLinear(row(tensor_model_parallel_size=4)))
    assert model(torch.randn(3, 1, IN // 4))[0].shape == (3, 1, OUT)


@pytest.mark.parametrize(
    ("linear_class", "settings"), [(ColumnParallelLinear, {}), (RowParallelLinear, {"input_is_parallel": True})]
)
def test_the_output_of_an_expert_is_left_to_the_dispatcher(tensor_parallel, linear_class, settings):
    tensor_parallel(2)
    linear = linear_class(
        IN,
        OUT,
        config=config(tensor_model_parallel_size=2),
        init_method=nn.init.normal_,
        bias=False,
        skip_bias_add=True,
        is_expert=True,
        **settings,
    )
    assert linear.explicit_expert_comm
    site = dora_fx.DoRA(["linear"], dim=DIM)(OneLinear(linear)).linear
    assert site.adapter.layout_name == ("row_expert" if settings else "column_expert")
    assert site.adapter.tp_group == linear.tp_group.group_name


@pytest.mark.parametrize("layer", [column, row])
def test_sequence_parallelism_on_one_rank_is_the_plain_layer(tensor_parallel, layer):
    tensor_parallel(1)
    with pytest.raises(ValueError, match="sequence parallelism without tensor parallelism"):
        config(sequence_parallel=True)
    plain, switched = adapted(layer()), layer()
    switched.sequence_parallel = True
    model = adapted(switched)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), plain.parameters(), strict=True):
            parameter.copy_(value)
        model.linear.adapter.weight_magnitude.mul_(1.5)
        plain.linear.adapter.weight_magnitude.mul_(1.5)
    x = torch.randn(4, 2, IN)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=0, atol=0)
