"""Single layers of Megatron's over Transformer Engine, for processes that have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dora_fx
from dora_fx import DoRALinear
from tests.distributed.zoo import DIM, TE_LAYERS, Topology, set_adapter_values, set_base_values

# One of each kind, norm and way with biases.
SINGLE_LAYERS = [name for name in TE_LAYERS if name not in ("te_gated_mlp", "te_chain")]


def layer_and_input(
    name: str, dtype: torch.dtype = torch.float32, topology: Topology | None = None
) -> tuple[nn.ModuleDict, torch.Tensor]:
    """A frozen layer as `model["linear"]` with values that its path decides, and this rank's input for it."""
    topology = topology or Topology()
    features, build = TE_LAYERS[name]
    model = nn.ModuleDict({"linear": build(topology, dtype)}).requires_grad_(False)
    set_base_values(model, topology)
    parallel = "row" in name
    tokens = 8 // topology.tp if topology.sequence_parallel and not parallel else 8
    x = torch.randn(tokens, 2, features // topology.tp if parallel else features)
    return model, x.to(dtype).requires_grad_()


def adapt(model: nn.Module, *, trained: bool = True, dropout: float = 0.0, targets: Any = ("linear",)) -> DoRALinear:
    """Adapt `model["linear"]`, with values away from the identity where it is to seem trained."""
    dora_fx.DoRA(list(targets), dim=DIM, alpha=2 * DIM, dropout=dropout)(model)
    if trained:
        set_adapter_values(model, Topology())
    site = model["linear"] if isinstance(model, nn.ModuleDict) else None
    assert site is None or isinstance(site, DoRALinear)
    return site  # type: ignore[return-value]


def output_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `model["linear"]` returns, with the bias that it may return apart."""
    output, bias = model["linear"](x)  # type: ignore[index,operator]
    return output if bias is None else output + bias
