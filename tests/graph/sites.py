"""Adapted single layers with odd small sizes, so that a wrong axis shows in a graph."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn

import dora_fx

IN, OUT, DIM = 48, 80, 16


class OneLinear(nn.Module):
    """A model of one linear layer that returns what the layer returns."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


def config(**overrides: Any) -> TransformerConfig:
    """The least configuration that Megatron's linear layers accept on a CPU."""
    settings = dict(num_layers=1, hidden_size=IN, num_attention_heads=8, use_cpu_initialization=True)
    return TransformerConfig(**(settings | overrides))


def column(*, bias: bool = False, skip_bias_add: bool = True, gather_output: bool = False, **cfg: Any) -> nn.Module:
    """A ColumnParallelLinear `[OUT, IN]`."""
    return ColumnParallelLinear(
        IN,
        OUT,
        config=config(**cfg),
        init_method=nn.init.normal_,
        bias=bias,
        skip_bias_add=skip_bias_add,
        gather_output=gather_output,
    )


def row(*, bias: bool = False, skip_bias_add: bool = True, input_is_parallel: bool = True, **cfg: Any) -> nn.Module:
    """A RowParallelLinear `[OUT, IN]`."""
    return RowParallelLinear(
        IN,
        OUT,
        config=config(**cfg),
        init_method=nn.init.normal_,
        bias=bias,
        skip_bias_add=skip_bias_add,
        input_is_parallel=input_is_parallel,
    )


def adapted(linear: nn.Module, **settings: Any) -> OneLinear:
    """The layer in a model of its own, with DoRA."""
    return dora_fx.DoRA(target_modules=["linear"], dim=DIM, alpha=32, **settings)(OneLinear(linear))
