"""A model like DeepSeek-V3: latent attention, a dense layer, then experts beside a shared one, a sigmoid with bias."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import nn

import dora_fx
from dora_fx.megatron import cuda_means_cpu
from dora_fx.models import causal_mask
from dora_fx.models.specs import FrozenRMSNorm
from tests.distributed.mla_models import LATENT, TARGETS
from tests.models import SEQUENCE, VOCAB, sites, token_ids


class AttentionOfEqualHeads(DotProductAttention):
    """Megatron's own attention, for latent attention with keys and values of the size that its config has."""

    def __init__(self, *args: Any, k_channels: int = 16, v_channels: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert k_channels == v_channels == self.config.kv_channels


def deepseek_like() -> GPTModel:
    config = MLATransformerConfig(
        num_layers=2,
        hidden_size=64,
        kv_channels=16,
        v_head_dim=16,
        masked_softmax_fusion=False,
        num_moe_experts=8,
        moe_layer_freq=[0, 1],
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=40,
        moe_router_topk=2,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="allgather",
        **LATENT,
    )
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    block.layer_norm = FrozenRMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = FrozenRMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.kv_layernorm = FrozenRMSNorm
        attention.core_attention = AttentionOfEqualHeads
    torch.manual_seed(0)
    model = GPTModel(config, block, VOCAB, SEQUENCE, position_embedding_type="rope")
    with torch.no_grad():
        model.decoder.layers[1].mlp.router.expert_bias.copy_(torch.linspace(-0.03, 0.03, 8))
    return model


def loss_of(model: Any) -> torch.Tensor:
    tokens = token_ids(SEQUENCE + 1)
    positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
    losses = model(tokens[:, :-1], positions, causal_mask(SEQUENCE, "cpu"), labels=tokens[:, 1:])
    return losses.mean()


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the base, by their names without adapters; counts of tokens are of the last steps."""
    return {
        name.replace(".to_wrap.", "."): value.detach().clone()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if ".adapter." not in name and not name.endswith("tokens_per_expert")
    }


def test_it_attaches_and_trains_with_the_base_left_alone(
    world: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(multi_latent_attention.TELinear, type):
        # megatron-core 0.16 asks whether a layer is of this class, also without Transformer Engine.
        monkeypatch.setattr(multi_latent_attention, "TELinear", type("TELinear", (), {}))
    model = deepseek_like()
    before, base = loss_of(model).item(), base_of(model)
    dora_fx.DoRA(TARGETS, dim=4)(model)
    assert loss_of(model).item() == before
    kinds = Counter(re.sub(r"\d+", "*", path) for path in sites(model))
    layer, moe = "decoder.layers.*.", "decoder.layers.*.mlp."
    assert kinds == {
        **{f"{layer}self_attention.linear_{name}": 2 for name in ("proj", "q_down_proj", "q_up_proj")},
        **{f"{layer}self_attention.linear_kv_{name}": 2 for name in ("down_proj", "up_proj")},
        **{f"{moe}{name}": 2 for name in ("linear_fc*", "shared_experts.linear_fc*")},
        f"{moe}experts.local_experts.*.linear_fc*": 16,
    }
    losses = train(model, steps=8)
    assert losses[0] == before and losses[-1] < losses[0]
    trained = base_of(model)
    assert trained.keys() >= base.keys() and "decoder.layers.1.mlp.router.expert_bias" in base
    assert [name for name in base if not torch.equal(trained[name], base[name])] == []
    counts = {path: adapter.adapter.linear_out.weight.count_nonzero().item() for path, adapter in sites(model).items()}
    untouched = {path for path, count in counts.items() if not count}
    # Some may get no token, which is nothing to warn of.
    assert all(".local_experts." in path for path in untouched) and len(untouched) < 16
    assert "found no gradient" not in caplog.text
    assert "moe_router_bias_update_rate: found 0.001, set to 0" in caplog.text


def train(model: Any, steps: int) -> list[float]:
    """Train under Megatron's data parallelism, which ends a step by moving a router's bias."""
    losses = []
    with cuda_means_cpu():
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            wrapped.zero_grad_buffer()
            loss = loss_of(wrapped)
            loss.backward()
            finalize_model_grads([wrapped])
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = parameter.main_grad
            optimizer.step()
            losses.append(loss.item())
    return losses
