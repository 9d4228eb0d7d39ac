"""Checkpoints as Megatron-Bridge writes them: by the package itself, and by hand from what is known of its layout."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

import dora_fx
from benchmarks.variants import import_bridge_dora
from tests.models import GPT_TARGETS, sites, tiny_gpt

DIM, ALPHA = 4, 12
TP = 2

Values = dict[str, torch.Tensor]


@contextmanager
def saving_on_cpu() -> Any:
    with mock.patch.object(torch.cuda, "synchronize", lambda *args: None):
        yield


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Other values on every rank, for the shards and for what ought to be a replica: Bridge's are none."""
    generator = torch.Generator().manual_seed(5 + parallel_state.get_tensor_model_parallel_rank())
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def adapter_shards(model: nn.Module) -> dict[str, Any]:
    """Bridge's filter: what has `.adapter.` in its key."""
    sharded = model.sharded_state_dict()
    return {key: value for key, value in sharded.items() if ".adapter." in key and "_extra_state" not in key}


def whole_values(model: nn.Module) -> Values:
    """Adapter tensors of all ranks joined by what each rank holds, written down here for each kind of layer."""
    whole: Values = {}
    for name, parameter in model.named_parameters():
        if ".adapter." not in name:
            continue
        parts = [torch.empty_like(parameter) for _ in range(TP)]
        dist.all_gather(parts, parameter.detach().contiguous())
        row = ".linear_proj." in name or ".linear_fc2." in name
        if row and name.endswith("weight_magnitude"):
            whole[name] = parts[0]
        elif ".linear_fc1." in name and not name.endswith("linear_in.weight"):
            halves = [part.chunk(2) for part in parts]
            whole[name] = torch.cat([half[block] for block in range(2) for half in halves])
        else:
            whole[name] = torch.cat(parts, 1 if row and name.endswith("linear_in.weight") else 0)
    return whole


def save_with_bridge(folder: Path) -> Values:
    """Save a model that the package adapted; returns the whole tensors."""
    model = tiny_gpt(tensor_model_parallel_size=TP)
    dora = import_bridge_dora()(target_modules=GPT_TARGETS, dim=DIM, alpha=ALPHA)
    model = dora(model, training=True)
    randomize(model)
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(model), str(folder))
    return whole_values(model)


def save_by_hand(folder: Path) -> Values:
    """The same from our adapters, with the magnitudes where Bridge puts them."""
    model = dora_fx.DoRA(GPT_TARGETS, dim=DIM, alpha=ALPHA)(tiny_gpt(tensor_model_parallel_size=TP))
    randomize(model)
    sharded = adapter_shards(model)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for key, value in sharded.items():
        if key.endswith("linear_fc1.adapter.weight_magnitude"):
            assert isinstance(value, ShardedTensorFactory)
            layer = int(key.split(".")[2])
            sharded[key] = ShardedTensor.from_rank_offsets(
                value.key, value.data, (0, layer, 2), (1, tp_rank, TP), replica_id=(0, 0, 0), prepend_axis_num=1
            )
    with saving_on_cpu():
        dist_checkpointing.save(sharded, str(folder))
    return whole_values(model)


def model_to_load_into(**overrides: Any) -> nn.Module:
    torch.manual_seed(2)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return dora_fx.DoRA(GPT_TARGETS, dim=DIM, alpha=ALPHA)(tiny_gpt(tensor_model_parallel_size=tp, **overrides))


def row_sites(model: nn.Module) -> list[str]:
    return [path for path in sites(model) if path.endswith(("linear_proj", "linear_fc2"))]
