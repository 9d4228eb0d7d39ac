"""Keys, global shapes, offsets and replicas of the adapters of a tiny GPT, as rank 0 of two describes them."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

import dora_fx
from tests.models import GPT_TARGETS, tiny_gpt


def describe(value: ShardedTensor) -> str:
    return (
        f"{list(value.global_shape)} local {list(value.local_shape)} at {list(value.global_offset)} {value.replica_id}"
    )


def adapter_rows(model) -> list[str]:
    rows = []
    for key, value in model.sharded_state_dict().items():
        if ".layers.0." not in key or ".adapter." not in key:
            continue
        name = key.removeprefix("decoder.layers.0.")
        if isinstance(value, ShardedTensorFactory):
            shards = value.build()
            shards = shards.values() if isinstance(shards, dict) else shards
            rows += [f"{name} {describe(shard)}" for shard in shards]
        else:
            rows.append(f"{name} {describe(value)}")
    return rows


@pytest.fixture
def model(tensor_parallel):
    tensor_parallel(2)
    model = tiny_gpt(tensor_model_parallel_size=2)
    return dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8)(model)


def test_adapter_shards(model):
    assert_expected_inline(
        "\n".join(sorted(adapter_rows(model))),
        """\
mlp.linear_fc1.adapter.linear_in.weight [2, 4, 32] local [2, 32] at [0, 0, 0] (0, 0, 0)
mlp.linear_fc1.adapter.linear_out.weight [2, 96, 4] local [24, 4] at [0, 0, 0] (0, 0, 0)
mlp.linear_fc1.adapter.linear_out.weight [2, 96, 4] local [24, 4] at [0, 48, 0] (0, 0, 0)
mlp.linear_fc1.adapter.weight_magnitude [2, 96] local [24] at [0, 0] (0, 0, 0)
mlp.linear_fc1.adapter.weight_magnitude [2, 96] local [24] at [0, 48] (0, 0, 0)
mlp.linear_fc2.adapter.linear_in.weight [2, 4, 48] local [4, 24] at [0, 0, 0] (0, 0, 0)
mlp.linear_fc2.adapter.linear_out.weight [2, 32, 4] local [16, 4] at [0, 0, 0] (0, 0, 0)
mlp.linear_fc2.adapter.weight_magnitude [2, 32] local [32] at [0, 0] (0, 0, 0)
self_attention.linear_proj.adapter.linear_in.weight [2, 4, 32] local [4, 16] at [0, 0, 0] (0, 0, 0)
self_attention.linear_proj.adapter.linear_out.weight [2, 32, 4] local [16, 4] at [0, 0, 0] (0, 0, 0)
self_attention.linear_proj.adapter.weight_magnitude [2, 32] local [32] at [0, 0] (0, 0, 0)
self_attention.linear_qkv.adapter.linear_in.weight [2, 4, 32] local [2, 32] at [0, 0, 0] (0, 0, 0)
self_attention.linear_qkv.adapter.linear_out.weight [2, 64, 4] local [32, 4] at [0, 0, 0] (0, 0, 0)
self_attention.linear_qkv.adapter.weight_magnitude [2, 64] local [32] at [0, 0] (0, 0, 0)""",
    )


def test_base_keys_are_those_of_the_model_without_adapters(model):
    plain = tiny_gpt(tensor_model_parallel_size=2)
    adapted_keys = {key for key in model.sharded_state_dict() if ".adapter." not in key}
    assert adapted_keys == set(plain.sharded_state_dict())


def test_base_shards_are_those_of_the_model_without_adapters(model):
    plain = tiny_gpt(tensor_model_parallel_size=2).sharded_state_dict()
    for key, value in model.sharded_state_dict().items():
        if isinstance(value, ShardedTensor) and ".adapter." not in key:
            assert describe(value) == describe(plain[key])
            assert value.dtype == torch.float32
