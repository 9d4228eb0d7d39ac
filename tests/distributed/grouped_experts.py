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
from tests.distributed.moe_layers import (
    DIM,
    EXPERTS,
    FEATURES,
    SCALING,
    TRAINED,
    ExpertLayout,
    MoE,
    Read,
    Results,
    attach,
    moe_config,
    own_part,
    set_router,
    whole_of,
    whole_tensors,
)
from tests.distributed.zoo import whole_values
from tests.megatron_checkpoint import without_cuda_generators


def build(layout: ExpertLayout, dtype: torch.dtype = torch.float64, **settings: Any) -> MoE:
    """A model that is one layer with grouped experts, frozen and with values by name."""
    settings = {"moe_grouped_gemm": True, "moe_shared_expert_intermediate_size": None} | settings
    return MoE(moe_config(layout, dtype, **settings), "te", set_base_values).requires_grad_(False)


def build_sequential(layout: ExpertLayout, dtype: torch.dtype = torch.float64) -> MoE:
    """The same with Megatron's SequentialMLP."""
    return MoE(moe_config(layout, dtype, moe_shared_expert_intermediate_size=None)).requires_grad_(False)


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
    set_router(model)
    for name, (layer, index) in places(model).items():
        weight = linears[layer].get_parameter(f"weight{index}")
        weight.copy_(own_part(name, linears[layer], "weight", whole_of(name)["weight"]))


def adapted(model: nn.Module, *, set_values: bool = True, **settings: Any) -> nn.Module:
    """The model with adapters on all its experts, whose values come from whole tensors or are the initial ones."""
    attach(model, **settings)
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


def tensors_of_experts(model: nn.Module, read: Read = lambda parameter: parameter, *, total: bool = False) -> Results:
    """What `tensors_of_sites` gives of layers of their own."""
    of_layers, own = sites(model), {}
    for name, (_, index) in places(model).items():
        site = of_layers[name]
        for kind, parameter in adapter_tensors(site).items():
            own[f"{name} {kind}"] = of_experts(read(parameter), site)[index]
    return whole_tensors(of_layers, own, total=total)


def gpt(layout: ExpertLayout, **settings: Any) -> nn.Module:
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
