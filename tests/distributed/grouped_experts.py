"""A mixture-of-experts layer whose experts are in grouped layers of Transformer Engine's, for processes that have it.

Values are those of `moe_layers.py`, by the experts' numbers in the whole model.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.enums import AttnBackend
from torch import nn

import dora_fx
from dora_fx import DoRALinear
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.modules import compile_grouped_linears
from tests.distributed.moe_layers import (
    DIM,
    EXPERTS,
    FEATURES,
    HIDDEN,
    SCALING,
    TRAINED,
    Layout,
    Oracle,
    Results,
    all_tokens,
    batch,
    build_moe_layer,
    moe_config,
    own_part,
    own_tokens,
    whole_of,
    whole_tensors,
)
from tests.distributed.moe_layers import set_base_values as set_values_of_sequential
from tests.distributed.zoo import whole_values
from tests.megatron_checkpoint import without_cuda_generators


def build(layout: Layout, dtype: torch.dtype = torch.float64, **settings: Any) -> OneLayer:
    """A model that is one layer with grouped experts, frozen and with values by name."""
    settings = {"moe_grouped_gemm": True, "moe_shared_expert_intermediate_size": None} | settings
    config = moe_config(layout, dtype, **settings)
    model = OneLayer(config, build_moe_layer(config, "te"))
    set_base_values(model)
    return model.requires_grad_(False)


class OneLayer(nn.Module):
    """A model that is one mixture-of-experts layer."""

    def __init__(self, config: Any, layer: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.mlp = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(x)[0]
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As a GPTModel of one layer, for checkpoints."""
        shards: dict[str, Any] = self.mlp.sharded_state_dict(f"{prefix}mlp.", sharded_offsets, metadata)
        return shards


def build_sequential(layout: Layout, dtype: torch.dtype = torch.float64) -> OneLayer:
    """The same with Megatron's SequentialMLP."""
    config = moe_config(layout, dtype, moe_shared_expert_intermediate_size=None)
    model = OneLayer(config, build_moe_layer(config, "local"))
    set_values_of_sequential(model)
    return model.requires_grad_(False)


def grouped_linears(model: nn.Module) -> dict[str, nn.Module]:
    """`linear_fc1` and `linear_fc2` of the layer's experts, adapted or not."""
    experts = next(module for module in model.modules() if type(module).__name__ == "TEGroupedMLP")
    return {name: getattr(experts, name) for name in FEATURES}


def places(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Name in the whole model of each expert's layer on this rank -> name of the grouped layer, and place there."""
    count = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * count
    return {f"expert {first + index} {name}": (name, index) for index in range(count) for name in FEATURES}


@torch.no_grad()
def set_base_values(model: nn.Module) -> None:
    linears = grouped_linears(model)
    for module in model.modules():
        if type(module).__name__ == "TopKRouter":
            module.weight.copy_(whole_values((EXPERTS, HIDDEN), "router", 0.5))
    for name, (layer, index) in places(model).items():
        weight = linears[layer].get_parameter(f"weight{index}")
        weight.copy_(own_part(name, linears[layer], "weight", whole_of(name)["weight"]))


def adapted(model: nn.Module, *, set_values: bool = True, **settings: Any) -> nn.Module:
    """The model with adapters on all its experts, whose values come from whole tensors or are the initial ones."""
    torch.manual_seed(11)
    dora_fx.DoRA(["linear_fc1", "linear_fc2"], dim=DIM, alpha=SCALING * DIM, **settings)(model)
    if set_values:
        set_adapter_values(model)
    return model


def sites(model: nn.Module) -> dict[str, DoRALinear]:
    """The adapted grouped layers, by the names of each of their experts."""
    linears = grouped_linears(model)
    return {name: linears[layer] for name, (layer, _) in places(model).items()}  # type: ignore[misc]


def adapter_tensors(site: DoRALinear) -> dict[str, nn.Parameter]:
    adapter = site.adapter
    tensors = (adapter.linear_in.weight, adapter.linear_out.weight, adapter.weight_magnitude)
    return dict(zip(TRAINED, tensors, strict=True))


def of_experts(tensor: torch.Tensor, site: DoRALinear) -> torch.Tensor:
    """A tensor of a site's adapter with a dimension of experts in front, which magnitudes lack."""
    return tensor.unflatten(0, (site.to_wrap.num_gemms, -1)) if tensor.dim() == 1 else tensor


@torch.no_grad()
def set_adapter_values(model: nn.Module) -> None:
    of_layers, where = sites(model), places(model)
    for name, site in of_layers.items():
        wholes = whole_of(name)
        for kind, tensor in adapter_tensors(site).items():
            of_experts(tensor, site)[where[name][1]].copy_(own_part(name, site.to_wrap, kind, wholes[kind]))


def tensors_of_experts(model: nn.Module, *, gradients: bool) -> Results:
    """The whole tensors of all experts' adapters, or their gradients, as layers of their own would have them."""
    of_layers, own = sites(model), {}
    for name, (_, index) in places(model).items():
        site = of_layers[name]
        for kind, tensor in adapter_tensors(site).items():
            whole = tensor.grad if gradients else tensor
            assert whole is not None
            own[f"{name} {kind}"] = of_experts(whole, site)[index]
    return whole_tensors(of_layers, own, total=gradients)


def step(model: nn.Module, layout: Layout, number: int, dtype: torch.dtype) -> Results:
    """Output and gradients of one batch."""
    model.zero_grad()
    x = own_tokens(batch(number), layout).to(dtype).requires_grad_()
    y = model(x)
    (y * own_tokens(batch(number, "loss"), layout).to(dtype)).sum().backward()
    gradients = tensors_of_experts(model, gradients=True)
    return {"y": all_tokens(y), "dx": all_tokens(x.grad), **{f"d {key}": value for key, value in gradients.items()}}


def oracle_step(number: int) -> Results:
    """The same of the oracle of `moe_layers.py` without shared experts."""
    oracle, x = Oracle(num_shared=0), batch(number).requires_grad_()
    y = oracle(x)
    (y * batch(number, "loss")).sum().backward()
    gradients = {f"d {key}": torch.zeros_like(p) if p.grad is None else p.grad for key, p in oracle.trained.items()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def compile_experts(model: nn.Module, inner_compiler: str = "aot_eager") -> None:
    """Compile the one function of each grouped layer."""
    compile_grouped_linears(model.modules(), {"backend": "dora_fx", "options": {"inner_compiler": inner_compiler}})


def gpt(layout: Layout, **settings: Any) -> nn.Module:
    """A GPT of two layers over Transformer Engine, of which every value is set; for the layers around the experts."""
    settings = {"moe_grouped_gemm": True, "num_layers": 2, "attention_backend": AttnBackend.unfused} | settings
    config = moe_config(layout, torch.float32, **settings)
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        # Megatron keeps the choice of its last model there.
        os.environ.pop(name, None)
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=EXPERTS, moe_grouped_gemm=True)
    torch.manual_seed(5)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=64)
    dora_fx.DoRA(["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=DIM, alpha=SCALING * DIM)(model)
    for name, parameter in model.named_parameters():
        if name.endswith("linear_out.weight"):
            parameter.data.copy_(whole_values(tuple(parameter.shape), name, 0.1))
    return model


def gpt_step(model: nn.Module, number: int, length: int) -> Results:
    """Loss and gradients of a batch whose tokens follow from its number."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(100 * number + parallel_state.get_data_parallel_rank())
    tokens = torch.randint(0, 32, (2, length + 1), generator=generator)
    positions = torch.arange(length).expand(2, -1)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    # Megatron's recomputation keeps the state of a device's generator.
    with cuda_means_cpu(), without_cuda_generators():
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert all(value is not None for value in gradients.values())
    return {"loss": loss.detach(), **{name: value.clone() for name, value in gradients.items() if value is not None}}
