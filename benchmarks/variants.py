"""The layers and models that are compared with one another; every variant has parameters of its own."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import nn

import dora_fx
from dora_fx import DoRALinear
from dora_fx.megatron.dynamo_settings import capture_megatron_whole

# LoRA's graphs are whole too.
capture_megatron_whole()

HAS_BRIDGE = importlib.util.find_spec("megatron.bridge") is not None


class LoRALinear(nn.Module):
    """The same A and B as a DoRA site's, without a magnitude."""

    def __init__(self, site: DoRALinear) -> None:
        super().__init__()
        self.to_wrap, self.scaling = site.to_wrap, site.scaling
        self.lora_a, self.lora_b = site.adapter.linear_in.weight, site.adapter.linear_out.weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = self.to_wrap(x, *args, **kwargs)
        return output + F.linear(F.linear(x, self.lora_a) * self.scaling, self.lora_b), bias


def with_dora(model: nn.Module, dim: int, targets: list[str]) -> nn.Module:
    """Attach DoRA whose B is not zero."""
    return dora_fx.DoRA(targets, dim=dim, alpha=2 * dim, lora_B_init_method="normal")(model)


def with_lora(model: nn.Module, dim: int, targets: list[str]) -> nn.Module:
    """Attach LoRA with the A and B that `with_dora` gives."""
    with_dora(model, dim, targets)
    for path, module in list(model.named_modules()):
        if isinstance(module, DoRALinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LoRALinear(module))
    return model


def with_bridge_dora(model: nn.Module, dim: int, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """Attach Megatron-Bridge's DoRA; needs `HAS_BRIDGE`."""
    settings = {"alpha": 2 * dim, "dropout": dropout, "lora_B_init_method": "normal"}
    return import_bridge_dora()(target_modules=targets, dim=dim, **settings)(model)


def import_bridge_dora() -> Any:
    """Megatron-Bridge's DoRA, without its other packages.

    `megatron/bridge/__init__.py` imports every model that it knows, and these need their own version of transformers.
    """
    if "megatron.bridge" not in sys.modules:
        # Made, and not executed.
        spec = importlib.util.find_spec("megatron.bridge")
        assert spec is not None
        sys.modules["megatron.bridge"] = importlib.util.module_from_spec(spec)
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.dora import DoRA

    # Without Transformer Engine its class checks compare with None.
    utils.HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
    return DoRA


def gated_mlp(
    hidden: int,
    ffn: int,
    dtype: torch.dtype,
    device: str,
    linears: tuple[type[nn.Module], type[nn.Module]] = (ColumnParallelLinear, RowParallelLinear),
) -> MLP:
    """Megatron's SwiGLU layer from column- and row-parallel linears, frozen."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=1,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bias_activation_fusion=False,
        normalization="RMSNorm",
    )
    mlp = MLP(config, MLPSubmodules(linear_fc1=linears[0], linear_fc2=linears[1]))
    return mlp.to(device).requires_grad_(False)


class PlainGatedMLP(nn.Module):
    """The same layer from `nn.Linear`, for adapters that know nothing else; returns what Megatron's returns."""

    def __init__(self, hidden: int, ffn: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        settings: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.linear_fc1 = nn.Linear(hidden, 2 * ffn, **settings)
        self.linear_fc2 = nn.Linear(ffn, hidden, **settings)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, up = self.linear_fc1(x).chunk(2, -1)
        return self.linear_fc2(F.silu(gate) * up), None


def with_peft(model: nn.Module, dim: int, targets: list[str], *, use_dora: bool = True) -> nn.Module:
    """Attach HF PEFT's DoRA, or LoRA, to `nn.Linear` layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=dim, lora_alpha=2 * dim, target_modules=targets, use_dora=use_dora)
    return get_peft_model(model, config)
