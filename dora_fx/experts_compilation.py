"""Compile the experts of Megatron's mixture-of-experts layers, and run what routes tokens to them as it is.

Routing asks for the numbers of tokens of each expert, and dispatchers allocate by them, so Dynamo would trace a layer
again for every batch, and Megatron's dispatchers on several ranks not at all. Each expert takes some tokens `[n, h]`
and is one graph. All experts of a kind share their graphs, one each for the first number of tokens, any number, an
input that is a view at an offset, no token, and one token. Of grouped experts, which Transformer Engine multiplies at
once and Dynamo does not trace, the graph is what their adapters add, one for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from dora_fx.modules import compile_grouped_linears


def moe_layers(modules: Iterable[nn.Module]) -> list[MoELayer]:
    """Return the mixture-of-experts layers among modules."""
    return [module for module in modules if isinstance(module, MoELayer)]


def compile_experts(layers: Iterable[MoELayer], settings: dict[str, Any]) -> None:
    """Compile the experts of layers, and have the layers themselves left out of any compilation.

    Args:
        settings: arguments of `torch.compile`.
    """
    for layer in layers:
        layer.forward = UncompiledForward(layer)
        for expert in _experts(layer):
            expert.compile(**settings)
        compile_grouped_linears(layer.modules(), settings)


def _experts(layer: Any) -> list[nn.Module]:
    local = list(layer.experts.local_experts) if isinstance(layer.experts, SequentialMLP) else []
    return [*local, *([layer.shared_experts] if layer.shared_experts is not None else [])]


class UncompiledForward:
    """The forward method of a module, which Dynamo does not trace; modules in it that are compiled stay compiled.

    An attribute of the module and no bound method, so that a copy of the module has one that calls the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch._dynamo.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)
