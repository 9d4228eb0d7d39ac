"""One model with every kind of adapted layer, its values set from whole tensors at any parallel size."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import nn

import dora_fx
from dora_fx import DoRALinear
from dora_fx.models.specs import FrozenRMSNorm

HIDDEN, FFN, VOCAB, DIM = 32, 48, 80, 8
SEQUENCE, BATCH = 8, 4


@dataclass(frozen=True)
class Topology:
    """Sizes of a world; `world_size` processes run it."""

    tp: int = 1
    sequence_parallel: bool = False
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}{'-sp' if self.sequence_parallel else ''}-dp{self.dp}"


def make_config(topology: Topology, dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
    settings = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=8,
        num_query_groups=4,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=topology.tp,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
    )
    return TransformerConfig(**(settings | overrides))


def _column(config: TransformerConfig, out: int = FFN, **kwargs: Any) -> nn.Module:
    settings = dict(config=config, init_method=nn.init.normal_, bias=True)
    return ColumnParallelLinear(HIDDEN, out, **(settings | kwargs))


def _row(config: TransformerConfig, **kwargs: Any) -> nn.Module:
    settings = dict(config=config, init_method=nn.init.normal_, bias=True, input_is_parallel=True)
    return RowParallelLinear(FFN, HIDDEN, **(settings | {"skip_bias_add": False} | kwargs))


def _mlp(config: TransformerConfig) -> nn.Module:
    return MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))


def _transformer_layer(config: TransformerConfig) -> nn.Module:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    # Megatron's torch norm refuses sequence parallelism.
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = FrozenRMSNorm
    return build_module(spec, config=config, layer_number=1).to(config.params_dtype)


def _te(name: str, config: TransformerConfig, in_features: int, out_features: int, **kwargs: Any) -> nn.Module:
    """A layer of Megatron's over Transformer Engine, in processes that have it."""
    from megatron.core.extensions import transformer_engine as layers

    settings = dict(config=config, init_method=nn.init.normal_, bias=True, skip_bias_add=False)
    return getattr(layers, name)(in_features, out_features, **(settings | kwargs))


def _te_norm_column(config: TransformerConfig, **kwargs: Any) -> nn.Module:
    kwargs = dict(gather_output=False, is_expert=False) | kwargs
    return _te("TELayerNormColumnParallelLinear", config, HIDDEN, FFN, **kwargs)


def _te_column(config: TransformerConfig, **kwargs: Any) -> nn.Module:
    return _te("TEColumnParallelLinear", config, HIDDEN, FFN, gather_output=False, is_expert=False, **kwargs)


def _te_row(config: TransformerConfig, **kwargs: Any) -> nn.Module:
    return _te("TERowParallelLinear", config, FFN, HIDDEN, input_is_parallel=True, is_expert=False, **kwargs)


def _te_duplicated(config: TransformerConfig, **kwargs: Any) -> nn.Module:
    kwargs = dict(parallel_mode="duplicated", skip_weight_param_allocation=False) | kwargs
    return _te("TELinear", config, HIDDEN, FFN, **kwargs)


def _te_mlp(config: TransformerConfig) -> nn.Module:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    return MLP(config, MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear))


class _TEChain(nn.Module):
    """Column with norm, row, duplicated: as in an MLP and what an attention with latents begins with."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear_fc1 = _te_norm_column(config)
        self.linear_fc2 = _te_row(config, skip_bias_add=True)
        self.linear_down = _te_duplicated(config, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden, _ = self.linear_fc1(x)
        output, bias = self.linear_fc2(F.gelu(hidden))
        return self.linear_down(x + output + bias)


CENTERED = {"layernorm_zero_centered_gamma": True}
LAYER_NORM = {"normalization": "LayerNorm"}

GATED = {"gated_linear_unit": True, "activation_func": F.silu}

# name -> (features of the whole input, builder from (topology, dtype))
LAYERS: dict[str, tuple[int, Callable[[Topology, torch.dtype], nn.Module]]] = {
    "column": (HIDDEN, lambda t, d: _column(make_config(t, d), bias=False)),
    "column_bias_added": (HIDDEN, lambda t, d: _column(make_config(t, d))),
    "column_bias_returned": (HIDDEN, lambda t, d: _column(make_config(t, d), skip_bias_add=True)),
    "column_gather_output": (HIDDEN, lambda t, d: _column(make_config(t, d), gather_output=True)),
    "row": (FFN, lambda t, d: _row(make_config(t, d), bias=False)),
    "row_bias_added": (FFN, lambda t, d: _row(make_config(t, d))),
    "row_bias_returned": (FFN, lambda t, d: _row(make_config(t, d), skip_bias_add=True)),
    "row_split_input": (FFN, lambda t, d: _row(make_config(t, d), input_is_parallel=False)),
    "plain_mlp": (HIDDEN, lambda t, d: _mlp(make_config(t, d))),
    "gated_mlp": (HIDDEN, lambda t, d: _mlp(make_config(t, d, **GATED))),
    "output_layer": (HIDDEN, lambda t, d: _column(make_config(t, d), VOCAB, bias=False)),
    "transformer_layer": (HIDDEN, lambda t, d: _transformer_layer(make_config(t, d, **GATED))),
}
# The same for layers over Transformer Engine.
TE_LAYERS: dict[str, tuple[int, Callable[[Topology, torch.dtype], nn.Module]]] = {
    "te_norm_column_rms": (HIDDEN, lambda t, d: _te_norm_column(make_config(t, d), bias=False)),
    "te_norm_column_rms_centered": (HIDDEN, lambda t, d: _te_norm_column(make_config(t, d, **CENTERED))),
    "te_norm_column_layer": (HIDDEN, lambda t, d: _te_norm_column(make_config(t, d, **LAYER_NORM), skip_bias_add=True)),
    "te_norm_column_layer_centered": (
        HIDDEN,
        lambda t, d: _te_norm_column(make_config(t, d, **LAYER_NORM, **CENTERED)),
    ),
    "te_column": (HIDDEN, lambda t, d: _te_column(make_config(t, d), bias=False)),
    "te_column_bias_added": (HIDDEN, lambda t, d: _te_column(make_config(t, d))),
    "te_column_bias_returned": (HIDDEN, lambda t, d: _te_column(make_config(t, d), skip_bias_add=True)),
    "te_row": (FFN, lambda t, d: _te_row(make_config(t, d), bias=False)),
    "te_row_bias_added": (FFN, lambda t, d: _te_row(make_config(t, d))),
    "te_row_bias_returned": (FFN, lambda t, d: _te_row(make_config(t, d), skip_bias_add=True)),
    "te_duplicated": (HIDDEN, lambda t, d: _te_duplicated(make_config(t, d), bias=False)),
    "te_duplicated_bias_added": (HIDDEN, lambda t, d: _te_duplicated(make_config(t, d))),
    "te_duplicated_bias_returned": (HIDDEN, lambda t, d: _te_duplicated(make_config(t, d), skip_bias_add=True)),
    "te_gated_mlp": (HIDDEN, lambda t, d: _te_mlp(make_config(t, d, **GATED))),
    "te_chain": (HIDDEN, lambda t, d: _TEChain(make_config(t, d))),
}
LAYERS |= TE_LAYERS
# Megatron's row layer refuses to split its own input under sequence parallelism.
NOT_SEQUENCE_PARALLEL = {"row_split_input"}


def layer_names(topology: Topology) -> list[str]:
    """The layers that a topology can run without Transformer Engine."""
    names = [name for name in LAYERS if name not in TE_LAYERS]
    return [name for name in names if not (topology.sequence_parallel and name in NOT_SEQUENCE_PARALLEL)]


class Zoo(nn.Module):
    """The layers side by side; each has its own input and output."""

    def __init__(
        self, topology: Topology, dtype: torch.dtype, dropout: float, names: Sequence[str], **settings: Any
    ) -> None:
        super().__init__()
        self.topology, self.names = topology, names
        self.layers = nn.ModuleDict({name: LAYERS[name][1](topology, dtype) for name in self.names})
        self.register_buffer("future", torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1))
        set_base_values(self, topology)
        # Drawn here only to be looked at: `set_adapter_values` gives the values that tests train.
        torch.manual_seed(11)
        dora_fx.DoRA(["layers.*"], dim=DIM, alpha=2 * DIM, dropout=dropout, lora_B_init_method="normal", **settings)(
            self
        )

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self.call_layer(name, inputs[name]) for name in self.names}

    def call_layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Output of one layer, with the bias that it may return apart."""
        if name == "transformer_layer":
            return self.layers[name](x, attention_mask=self.future)[0]
        output, bias = self.layers[name](x)
        return output if bias is None else output + bias


def sites_of(model: nn.Module) -> dict[str, DoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, DoRALinear)}


def whole_values(shape: tuple[int, ...], name: str, std: float) -> torch.Tensor:
    """Values of a whole tensor, from its name alone; every dtype of the tests can represent them."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * std).bfloat16().double()


def split(whole: torch.Tensor, dim: int | None, index: int, parts: int, blocks: int = 1) -> torch.Tensor:
    """One rank's part of a whole tensor whose `dim` is made of `blocks`, each split on its own."""
    if dim is None:
        return whole
    pieces = [torch.tensor_split(block, parts, dim)[index] for block in torch.tensor_split(whole, blocks, dim)]
    return torch.cat(pieces, dim)


def join(parts: list[torch.Tensor], dim: int | None, blocks: int = 1) -> torch.Tensor:
    """The whole tensor of which `split` made the parts."""
    if dim is None:
        return parts[0]
    pieces = [torch.tensor_split(part, blocks, dim) for part in parts]
    return torch.cat([piece[block] for block in range(blocks) for piece in pieces], dim)


@dataclass(frozen=True)
class Sharding:
    """How one parameter of a site is spread over the tensor-parallel group."""

    dim: int | None
    blocks: int = 1


def shardings(path: str, linear: nn.Module) -> dict[str, Sharding]:
    """Parameter of a site -> its sharding, written down here from the design and not read from the library."""
    blocks = 2 if path.endswith("linear_fc1") and linear.config.gated_linear_unit else 1
    whole, rows, columns = Sharding(None), Sharding(0, blocks), Sharding(1)
    kind = type(linear).__name__
    norm = {"layer_norm_weight": whole, "layer_norm_bias": whole}
    if "ColumnParallel" in kind:
        return norm | {"weight": rows, "bias": rows, "lora_a": Sharding(0), "lora_b": rows, "magnitude": rows}
    if "RowParallel" in kind:
        return {"weight": columns, "bias": whole, "lora_a": columns, "lora_b": Sharding(0), "magnitude": whole}
    assert kind == "TELinear"
    return dict.fromkeys(("weight", "bias", "lora_a", "lora_b", "magnitude"), whole)


def tensors_of(site: DoRALinear) -> dict[str, nn.Parameter]:
    return {
        "weight": site.to_wrap.weight,
        "lora_a": site.adapter.linear_in.weight,
        "lora_b": site.adapter.linear_out.weight,
        "magnitude": site.adapter.weight_magnitude,
    }


STD = {"weight": HIDDEN**-0.5, "bias": 1.0, "lora_a": HIDDEN**-0.5, "lora_b": 0.2}
STD |= {"layer_norm_weight": 0.5, "layer_norm_bias": 0.5}


def tp_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


@torch.no_grad()
def set_base_values(model: nn.Module, topology: Topology) -> None:
    """Set the weights and biases of every linear layer from whole tensors."""
    for path, linear in model.named_modules():
        if type(linear).__name__.endswith("ParallelLinear") or type(linear).__name__ == "TELinear":
            for name, tensor in linear.named_parameters(recurse=False):
                _set(tensor, whole_like(tensor, path, name, linear, topology), shardings(path, linear)[name], topology)


@torch.no_grad()
def set_adapter_values(model: nn.Module, topology: Topology) -> None:
    """Set every adapter from whole tensors; magnitudes lie between half and 1.5 of the norm."""
    for path, site in sites_of(model).items():
        tensors, rules = tensors_of(site), shardings(path, site.to_wrap)
        wholes = {
            name: whole_like(tensors[name], path, name, site.to_wrap, topology)
            for name in ("weight", "lora_a", "lora_b")
        }
        dense = wholes["weight"] + site.scaling * wholes["lora_b"] @ wholes["lora_a"]
        gain = 1.0 + 0.5 * torch.tanh(whole_values((dense.shape[0],), f"{path}.gain", 1.0))
        wholes["magnitude"] = (dense.norm(dim=1) * gain).float().double()
        for name in ("lora_a", "lora_b", "magnitude"):
            _set(tensors[name], wholes[name], rules[name], topology)


def whole_like(tensor: torch.Tensor, path: str, name: str, linear: nn.Module, topology: Topology) -> torch.Tensor:
    """The whole tensor of which `tensor` is to hold a shard."""
    shape = list(tensor.shape)
    dim = shardings(path, linear)[name].dim
    if dim is not None:
        shape[dim] *= topology.tp
    return whole_values(tuple(shape), f"{path}.{name}", STD[name])


def _set(tensor: torch.Tensor, whole: torch.Tensor, sharding: Sharding, topology: Topology) -> None:
    tensor.copy_(split(whole, sharding.dim, tp_rank(), topology.tp, sharding.blocks))


def gather(tensor: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole of a tensor that the ranks of a group hold in shards, in float64."""
    tensor = tensor.detach().double().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return join(parts, sharding.dim, sharding.blocks)
