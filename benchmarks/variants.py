"""The layers and models that are compared with one another; every variant has parameters of its own."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, build_module
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import nn
from torch._dynamo import list_backends, register_backend

import dora_fx
from dora_fx import DoRALinear
from dora_fx import backend as dora_fx_backend
from dora_fx.megatron.dynamo_settings import capture_megatron_whole

# LoRA's graphs are whole too.
capture_megatron_whole()

# torch finds the backend of an installed distribution by its name, and that of a checkout on the path not at all.
if "dora_fx" not in list_backends():
    register_backend(dora_fx_backend.dora_fx, name="dora_fx")

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


class MegatronBridgeLikeLinear(LoRALinear):
    """DoRA with the formula of Megatron-Bridge on one rank: the norm of a dense W0 + s B A at every call."""

    def __init__(self, site: DoRALinear) -> None:
        super().__init__(site)
        self.magnitude = nn.Parameter(self._norm())

    def _norm(self) -> torch.Tensor:
        weight = self.to_wrap.weight + self.scaling * self.lora_b @ self.lora_a
        return torch.linalg.norm(weight, dim=1).to(weight.dtype).detach()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = self.to_wrap(x, *args, **kwargs)
        update = F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scaling
        return (self.magnitude / self._norm()) * (output + update), bias


class PEFTLikeLinear(LoRALinear):
    """DoRA with the formula of HF PEFT: the norm of `peft_norm` at every call, added to the base's output."""

    def __init__(self, site: DoRALinear) -> None:
        super().__init__(site)
        self.magnitude = nn.Parameter(self._norm())

    def _norm(self) -> torch.Tensor:
        return peft_norm(self.to_wrap.weight, self.lora_a, self.lora_b, self.scaling).detach()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = self.to_wrap(x, *args, **kwargs)
        gain = self.magnitude / self._norm()
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return output + ((gain - 1) * output + gain * update * self.scaling), bias


def peft_norm(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Row norms of W0 + s B A as HF PEFT computes them, which gets B A from the product with an identity matrix."""
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    update = F.linear(F.linear(identity, lora_a), lora_b).t().detach()
    return torch.linalg.norm(weight + scaling * update, dim=1).to(weight.dtype)


def with_dora(model: nn.Module, dim: int, targets: list[str]) -> nn.Module:
    """Attach DoRA whose B is not zero."""
    return dora_fx.DoRA(targets, dim=dim, alpha=2 * dim, lora_B_init_method="normal")(model)


def with_lora(model: nn.Module, dim: int, targets: list[str], linear: type[LoRALinear] = LoRALinear) -> nn.Module:
    """Attach LoRA, or another adapter of the module `linear`, with the A and B that `with_dora` gives."""
    with_dora(model, dim, targets)
    for path, module in list(model.named_modules()):
        if isinstance(module, DoRALinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear(module))
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


class TorchAttention(nn.Module):
    """Causal attention of torch in the place of Megatron's own, which keeps all scores."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """From `[s, b, heads, head]`, keys and values with as many heads as there are groups, to `[s, b, h]`."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.permute(2, 0, 1, 3).flatten(2)


def torch_attention_spec() -> ModuleSpec:
    """Megatron's own layers with RMSNorm and `TorchAttention`."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = TorchAttention
    return spec


class WholeLayer(nn.Module):
    """Megatron's transformer layer of a Llama or Qwen, frozen, with rotary positions for `tokens` of one sequence."""

    def __init__(
        self, hidden: int, ffn: int, heads: int, groups: int, tokens: int, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            # A CPU would draw for seconds what the device draws at once.
            perform_initialization=False,
            params_dtype=dtype,
            normalization="RMSNorm",
        )
        self.layer = build_module(torch_attention_spec(), config=config, layer_number=1).to(device)
        for parameter in self.layer.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.requires_grad_(False)
        rotary = RotaryEmbedding(hidden // heads, rotary_percent=1.0, use_cpu_initialization=True)
        self.register_buffer("rotary", rotary(tokens).to(device))

    def forward(self, x: torch.Tensor) -> Any:
        """From `[tokens, 1, hidden]` to the same and a context that is None."""
        return self.layer(x, attention_mask=None, rotary_pos_emb=self.rotary)


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
