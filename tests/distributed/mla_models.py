"""A transformer layer with multi-latent attention, of either spec, on any number of tensor-parallel ranks.

Megatron's own plain attention does not take keys and values of different sizes, so the layers of the local spec have
Transformer Engine's attention, too; its kernels are emulated, and attention is its own in plain torch.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import nn

import dora_fx
from dora_fx.models.specs import FrozenRMSNorm
from tests.adapter_shards import AdapterShards

HIDDEN, SEQUENCE, BATCH, DIM = 32, 8, 2, 4
TARGETS = ["*.linear_q_*", "*.linear_kv_*", "linear_proj", "linear_fc1", "linear_fc2"]
# Names in Transformer Engine's spec -> in the local one.
_LOCAL_NAMES = {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


# Settings of tiny models with latent attention.
LATENT: dict[str, Any] = dict(
    ffn_hidden_size=48,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=8,
    rope_type="rope",
    multi_latent_attention=True,
    normalization="RMSNorm",
    qk_layernorm=True,
    gated_linear_unit=True,
    activation_func=F.silu,
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    use_cpu_initialization=True,
    apply_rope_fusion=False,
    gradient_accumulation_fusion=False,
    bias_dropout_fusion=False,
)


def mla_config(sequence_parallel: bool) -> MLATransformerConfig:
    return MLATransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        v_head_dim=8,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        **LATENT,
    )


def mla_layer(spec: str, sequence_parallel: bool) -> nn.Module:
    """A layer whose whole weights depend on their names alone."""
    layer = build_module(_spec(spec), config=mla_config(sequence_parallel), layer_number=1)
    tp_rank, tp_size = parallel_state.get_tensor_model_parallel_rank(), layer.config.tensor_model_parallel_size
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            is_parallel = getattr(parameter, "tensor_model_parallel", False)
            # Megatron 0.16 says so of duplicated weights, too.
            is_duplicated = getattr(layer.get_submodule(name.rpartition(".")[0]), "parallel_mode", "") is None
            dim = parameter.partition_dim if is_parallel and not is_duplicated else None
            shape = list(parameter.shape)
            if dim is not None:
                shape[dim] *= tp_size
            whole = _values(_LOCAL_NAMES.get(name, name), tuple(shape))
            blocks = whole.chunk(2) if "linear_fc1.weight" in name else [whole]
            parameter.copy_(whole if dim is None else torch.cat([b.chunk(tp_size, dim)[tp_rank] for b in blocks], dim))
    return layer


def adapted_mla(spec: str, sequence_parallel: bool, dropout: float = 0.0) -> nn.Module:
    """The layer with adapters whose whole values depend on their names alone."""
    layer = mla_layer(spec, sequence_parallel)
    dora_fx.DoRA(TARGETS, dim=DIM, alpha=8, dropout=dropout)(layer)
    for path, site in layer.named_modules():
        if isinstance(site, dora_fx.DoRALinear):
            adapter = site.adapter
            for name, parameter in adapter.named_parameters():
                placement = adapter.placements[name]
                whole = _values(f"{path}.{name}", placement.shape)
                whole = whole.abs() + 0.5 if name == "weight_magnitude" else 0.5 * whole
                with torch.no_grad():
                    parameter.copy_(placement.pad_and_shard(whole, adapter.tp_rank, adapter.tp_size))
    return layer


def one_step_and_twenty(spec: str, sequence_parallel: bool, dropout: float = 0.0) -> dict[str, torch.Tensor]:
    """Whole output, input gradient and adapter gradients of a step, and adapters after 20 steps of SGD."""
    layer = adapted_mla(spec, sequence_parallel, dropout)
    shards, found = AdapterShards(layer), {}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    for step in range(20):
        output, grad = _forward_and_backward(layer, sequence_parallel)
        if step == 0:
            found |= {"y": output, "dx": grad}
            for name, parameter in shards.parameters.items():
                found[f"d {name}"] = shards.gather(name, parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    found |= {f"trained {name}": shards.gather(name, parameter) for name, parameter in shards.parameters.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def base_step(spec: str, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Output and input gradient of the layer without adapters."""
    output, grad = _forward_and_backward(mla_layer(spec, sequence_parallel).requires_grad_(False), sequence_parallel)
    return {"y": output, "dx": grad}


def files_and_merged(specs: list[str], folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs of the layer in each spec, adapted and merged, and with the adapters of a checkpoint of the first."""
    found = {}
    for spec in specs:
        layer = adapted_mla(spec, False)
        if spec == specs[0]:
            trained = dict(layer.named_parameters())
            torch.save({name: p for name, p in trained.items() if ".adapter." in name}, Path(folder) / "adapter")
        saved = torch.load(Path(folder) / "adapter")
        assert set(saved) == {name for name, _ in layer.named_parameters() if ".adapter." in name}
        layer.load_state_dict({name.replace(".to_wrap", ""): value for name, value in saved.items()}, strict=False)
        output = _forward_and_backward(layer, False)[0]
        with dora_fx.merged(layer), torch.no_grad():
            merged = layer(_values("x", (SEQUENCE, BATCH, HIDDEN)), attention_mask=_future())[0]
        found[spec] = {"adapted": output, "merged": merged}
    return found


def refusal_of_splitting() -> str:
    """What Megatron's preparation for cached latents says of an adapted layer, which stays as it is."""
    layer = adapted_mla("te", False)
    attention: Any = layer.self_attention
    site = attention.linear_kv_up_proj
    try:
        attention.prepare_for_absorption()
    except ValueError as error:
        assert attention.linear_kv_up_proj is site and not hasattr(attention, "up_k_weight")
        _forward_and_backward(layer, False)
        return str(error)
    return "not refused"


def refusal_of_fused_projections() -> str:
    """What attaching says of the down-projections of query and key in one layer; the model stays as it is."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(
        multi_latent_attention=True, qk_layernorm=True, mla_down_proj_fusion=True
    )
    layer = build_module(spec, config=mla_config(False), layer_number=1)
    before = [name for name, _ in layer.named_modules()]
    try:
        dora_fx.DoRA(["linear_proj", "linear_qkv_down_proj"], dim=DIM)(layer)
    except ValueError as error:
        assert [name for name, _ in layer.named_modules()] == before
        return str(error)
    return "not refused"


def _forward_and_backward(layer: Any, sequence_parallel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole output and whole gradient of the input, of the mean square of the distance from a target."""
    x, target = (_values(name, (SEQUENCE, BATCH, HIDDEN)) for name in ("x", "target"))
    if sequence_parallel:
        tp_rank, tp_size = parallel_state.get_tensor_model_parallel_rank(), layer.config.tensor_model_parallel_size
        x, target = (tensor.chunk(tp_size)[tp_rank] for tensor in (x, target))
    x = x.clone().requires_grad_()
    output, _ = layer(x, attention_mask=_future())
    ((output - target).square().sum() / (SEQUENCE * BATCH * HIDDEN)).backward()
    return _joined(output.detach(), sequence_parallel), _joined(x.grad, sequence_parallel)


def _spec(spec: str) -> Any:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.models.gpt import gpt_layer_specs

    settings = dict(multi_latent_attention=True, qk_layernorm=True)
    if spec == "te":
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**settings)
    layer = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", **settings)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TEDotProductAttention
    attention.q_layernorm = attention.kv_layernorm = FrozenRMSNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = FrozenRMSNorm
    return layer


def _future() -> torch.Tensor:
    return torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return noise * shape[-1] ** -0.5 if len(shape) == 2 else 1.0 + 0.3 * noise if len(shape) == 1 else noise


def _joined(tensor: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    if not sequence_parallel:
        return tensor
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)
