"""Hugging Face weights as full Megatron tensors, and the shard of one that a tensor-parallel rank keeps.

    q_proj, k_proj, v_proj   ->  linear_qkv: per query group [q ... q k v], so that a rank's shard is whole groups
    o_proj                   ->  linear_proj
    gate_proj, up_proj       ->  linear_fc1: [gate; up] on every rank, so each half is sharded by itself
    down_proj                ->  linear_fc2

Pure functions of tensors: nothing here knows a model, a process group or a file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_fx.function.placement import shard
from dora_fx.models.architecture import GPTArchitecture

# Hugging Face name -> Megatron name, both within their layer, for the tensors that are the same in both.
_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_SAME_QK_LAYERNORM = {
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
}


def hf_layer_names(architecture: GPTArchitecture) -> list[str]:
    """Names, within a layer, of the Hugging Face tensors that `megatron_layer_tensors` reads."""
    names = [*_SAME, "mlp.gate_proj.weight", "mlp.up_proj.weight"]
    kinds = ("weight", "bias") if architecture.qkv_bias else ("weight",)
    names += [f"self_attn.{part}_proj.{kind}" for kind in kinds for part in "qkv"]
    return names + (list(_SAME_QK_LAYERNORM) if architecture.qk_layernorm else [])


def megatron_layer_tensors(architecture: GPTArchitecture, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's full Megatron tensors by their name within the layer.

    Args:
        architecture: of the checkpoint. With more query groups than the tensors of `hf` hold, the rest are zero.
        hf: the layer's tensors by the names of `hf_layer_names`.
    """
    same = _SAME | (_SAME_QK_LAYERNORM if architecture.qk_layernorm else {})
    tensors = {megatron_name: hf[hf_name] for hf_name, megatron_name in same.items()}
    tensors["self_attention.linear_qkv.weight"] = _interleave_qkv(architecture, hf, "weight")
    if architecture.qkv_bias:
        tensors["self_attention.linear_qkv.bias"] = _interleave_qkv(architecture, hf, "bias")
    tensors["mlp.linear_fc1.weight"] = torch.cat([hf["mlp.gate_proj.weight"], hf["mlp.up_proj.weight"]])
    return pad_query_groups(architecture, tensors)


def pad_query_groups(architecture: GPTArchitecture, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Append zero query groups until `tensors` holds as many as `architecture`.

    A zero group has keys and values of zero, so its heads put out zero, and its columns of linear_proj are zero
    too: the function stays the same, and training cannot reach the frozen zeros.
    """
    heads_size = architecture.num_attention_heads * architecture.kv_channels
    qkv_size = heads_size + 2 * architecture.num_query_groups * architecture.kv_channels
    padded = dict(tensors)
    for name, dim, size in (
        ("self_attention.linear_qkv.weight", 0, qkv_size),
        ("self_attention.linear_qkv.bias", 0, qkv_size),
        ("self_attention.linear_proj.weight", 1, heads_size),
    ):
        if name in padded and padded[name].shape[dim] < size:
            padded[name] = _pad_with_zeros(padded[name], dim, size)
    return padded


def shard_of(name: str, full: Tensor, partition_dim: int, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a full tensor that one rank keeps.

    Args:
        name: the Megatron name; linear_fc1 holds gate and up, and each is divided over the ranks.
        full: the whole tensor.
        partition_dim: the sharded dimension, as Megatron's parameter says.
        tp_rank: which shard.
        tp_size: number of shards.

    Raises:
        ValueError: the dimension does not divide by the number of shards.
    """
    blocks = 2 if ".linear_fc1." in name else 1
    size = full.shape[partition_dim] // blocks
    if size % tp_size:
        raise ValueError(f"{name}: size {size} of dimension {partition_dim} does not divide by {tp_size} ranks")
    return shard(full, partition_dim, tp_rank, tp_size, blocks)


def _interleave_qkv(architecture: GPTArchitecture, hf: Mapping[str, Tensor], kind: str) -> Tensor:
    """Rows of q, k and v gathered by query group; `kind` is "weight" or "bias"."""
    query, key, value = (hf[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
    num_groups = key.shape[0] // architecture.kv_channels
    rest = query.shape[1:]
    groups = [part.reshape(num_groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(groups, dim=1).reshape(-1, *rest)


def _pad_with_zeros(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
