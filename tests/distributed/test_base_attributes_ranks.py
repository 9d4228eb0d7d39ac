"""Megatron's inference switches an output layer's sequence parallelism off for a call, through the adapted layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import nn

import dora_fx
from tests.distributed.launch import run_ranks
from tests.models import IN, OUT, config, randomize_adapters

TP = 2


def difference() -> tuple[float, str]:
    """Between the output of a sharded sequence and that of the gathered one, with the switch as Megatron sets it."""
    settings = config(tensor_model_parallel_size=TP, sequence_parallel=True, num_attention_heads=TP)
    base = ColumnParallelLinear(IN, OUT, config=settings, init_method=nn.init.normal_, bias=False).double()
    model = nn.ModuleDict({"output_layer": base})
    dora_fx.DoRA(["output_layer"], dim=4)(model, training=False)
    layer = model["output_layer"]
    randomize_adapters(model, seed=1 + dist.get_rank())
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, IN, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        sharded, _ = layer(x.chunk(TP)[dist.get_rank()].contiguous())
        assert layer.sequence_parallel
        layer.sequence_parallel = False
        gathered, _ = layer(x)
        layer.sequence_parallel = True
        again, _ = layer(x.chunk(TP)[dist.get_rank()].contiguous())
    assert torch.equal(again, sharded)
    return (sharded - gathered).abs().max().item() / sharded.abs().max().item(), layer.adapter.layout_name


def test_sequence_parallelism_is_switched_off_for_a_call() -> None:
    error, layout = run_ranks(difference, TP, TP)
    assert layout == "column_sequence_parallel"
    assert error < 1e-14
