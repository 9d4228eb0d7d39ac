"""Join the ranks' shards of adapter tensors to whole tensors.

A whole tensor does not depend on the tensor-parallel size: shards are joined as the layout table says, and the padding
that makes the base model's sizes divisible (see `ParallelLinearDoRAAdapter`) is cut off.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dora_fx.function import ParameterPlacement
from dora_fx.ranks import group_size, resolve_group


def gather_whole(local: torch.Tensor, placement: ParameterPlacement, tp_group: str) -> torch.Tensor:
    """Return the whole of a tensor, without padding, on every rank of the group, all of which call it.

    Args:
        local: this rank's shard.
        placement: says how it is sharded.
        tp_group: name of the tensor-parallel group; "" where it has one rank.
    """
    local = local.detach().contiguous()
    parts = [local]
    if tp_group and placement.shard_dim is not None:
        parts = [torch.empty_like(local) for _ in range(group_size(tp_group))]
        dist.all_gather(parts, local, group=resolve_group(tp_group))
    return placement.unshard_and_cut(parts)
