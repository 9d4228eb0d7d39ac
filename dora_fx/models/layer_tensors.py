"""Combines Hugging Face weights into full Megatron tensors, and cuts out a tensor-parallel rank's shard.

    query, key, value   ->  linear_qkv: per query group [q ... q k v], so that a rank's shard is whole groups
    gate, up            ->  linear_fc1: [gate; up] on every rank, so each half is sharded by itself; also of an expert

All functions are pure functions of tensors, without a model, a process group or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_fx.function import shard
from dora_fx.models.architecture import GPTArchitecture
from dora_fx.models.hf_architectures import LINEAR_PROJ, LINEAR_QKV, HFArchitecture, is_fc1
from dora_fx.models.hf_parts import HFParts


def hf_layer_names(architecture: GPTArchitecture, experts: Sequence[int] | None = None) -> list[str]:
    """Return the names within a layer of the Hugging Face tensors that `megatron_layer_tensors` reads."""
    hf = architecture.hf
    return [f"{name}.weight" for name in hf.plain_modules.values()] + [
        f"{name}.{kind}"
        for linear, parts in hf.linears_of_layer(_numbers(architecture, experts)).items()
        for name in parts
        for kind in _kinds(hf, linear)
    ]


def megatron_layer_tensors(
    architecture: GPTArchitecture, hf: Mapping[str, Tensor], experts: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Build one layer's full Megatron tensors, by their names within the layer.

    Args:
        architecture: of the checkpoint. If it has more query groups than the tensors of `hf`, zeros are added.
        hf: the layer's tensors by the names of `hf_layer_names`.
        experts: numbers of those to build; None for all.
    """
    parts = HFParts.of(architecture.hf, architecture)
    tensors = {f"{own}.weight": hf[f"{name}.weight"] for own, name in architecture.hf.plain_modules.items()}
    for linear, names in architecture.hf.linears_of_layer(_numbers(architecture, experts)).items():
        for kind in _kinds(architecture.hf, linear):
            own = {f"{name}.{kind}": hf[f"{name}.{kind}"] for name in names}
            tensors[f"{linear}.{kind}"] = _joined(parts, linear, own)
    return pad_query_groups(architecture, tensors)


def pad_query_groups(architecture: GPTArchitecture, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Append query groups of zeros until `tensors` has as many as `architecture`.

    The keys and values of such a group are zero, so its heads output zero, and its columns of linear_proj are zero too.
    The layer computes the same, and the zeros are frozen with the base.
    """
    heads_size = architecture.num_attention_heads * architecture.kv_channels
    qkv_size = heads_size + 2 * architecture.num_query_groups * architecture.kv_channels
    padded = dict(tensors)
    for name, dim, size in (
        (f"{LINEAR_QKV}.weight", 0, qkv_size),
        (f"{LINEAR_QKV}.bias", 0, qkv_size),
        (f"{LINEAR_PROJ}.weight", 1, heads_size),
    ):
        if name in padded and padded[name].shape[dim] < size:
            padded[name] = _pad_with_zeros(padded[name], dim, size)
    return padded


def shard_of(name: str, full: Tensor, partition_dim: int, tp_rank: int, tp_size: int) -> Tensor:
    """Cut one rank's shard out of a full tensor.

    Args:
        name: the Megatron name; linear_fc1 holds gate and up, and each is sharded by itself.
        full: the whole tensor.
        partition_dim: the sharded dimension, an attribute of Megatron's parameter.
        tp_rank: index of the shard; of an expert's, in the expert-tensor-parallel group.
        tp_size: number of shards.

    Raises:
        ValueError: the dimension is not divisible by the number of shards.
    """
    blocks = 2 if is_fc1(name.rpartition(".")[0]) else 1
    size = full.shape[partition_dim] // blocks
    if size % tp_size:
        raise ValueError(f"{name}: size {size} of dimension {partition_dim} does not divide by {tp_size} ranks")
    return shard(full, partition_dim, tp_rank, tp_size, blocks)


def _numbers(architecture: GPTArchitecture, experts: Sequence[int] | None) -> Sequence[int]:
    return range(architecture.num_experts) if experts is None else experts


def _kinds(hf: HFArchitecture, linear: str) -> tuple[str, ...]:
    return ("weight", "bias") if hf.qkv_bias and linear == LINEAR_QKV else ("weight",)


def _joined(parts: HFParts, linear: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Join the weights or biases of Hugging Face layers, in the record's order, into the Megatron layer's."""
    stacked = torch.cat(list(tensors.values())) if len(tensors) > 1 else next(iter(tensors.values()))
    rows = parts.row_parts(linear, stacked.shape[0])
    for (name, tensor), own in zip(tensors.items(), rows, strict=True):
        if tensor.shape[0] != len(own):
            raise ValueError(f"{name}: found {tensor.shape[0]} rows, expected {len(own)} of {linear}'s {len(stacked)}")
    order = torch.cat(rows)
    # No copy if the order is the same, as in all layers but linear_qkv.
    if torch.equal(order, torch.arange(len(order))):
        return stacked
    return torch.empty_like(stacked).index_copy_(0, order.to(stacked.device), stacked)


def _pad_with_zeros(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
