"""Routers of transformers models stay frozen, linear layers inside them too, and experts of every shape are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dora_fx
from dora_fx.megatron import megatron_world
from dora_fx.models import build_gpt_model, causal_mask
from tests.hf_models import SHAPE, tiny_hf_model
from tests.tables import every_case


def gemma4() -> nn.Module:
    config = transformers.Gemma4TextConfig(
        **SHAPE,
        head_dim=8,
        global_head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        top_k_experts=2,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(**SHAPE, intermediate_size_mlp=40, num_local_experts=4, head_dim=8)
    return transformers.AutoModelForCausalLM.from_config(config)


def dbrx() -> nn.Module:
    """Experts of a layer are one matrix."""
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 64}
    config = transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn)
    config.attn_config.rope_theta = 1e4
    return transformers.AutoModelForCausalLM.from_config(config)


class Gated(nn.Module):
    """Experts behind a linear layer, as models had them before routers were classes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate, self.mlp.shared_expert_gate = nn.Linear(8, 4), nn.Linear(8, 1)
        self.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


MODELS: dict[str, Callable[[], nn.Module]] = {"gemma4": gemma4, "llama4": llama4, "dbrx": dbrx, "gated": Gated}
ROUTERS = {
    "gemma4": "model.layers.0.router.proj",
    "llama4": "model.layers.0.feed_forward.router",
    "dbrx": "transformer.blocks.0.ffn.router.layer",
    "gated": "mlp.gate",
}


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, dora_fx.DoRALinear)]


@every_case("kind", list(MODELS))
def test_all_linear_leaves_routers_alone(kind: str) -> None:
    model = MODELS[kind]()
    dora = dora_fx.DoRA("all-linear", dim=2, alpha=4)
    dora(model)
    assert ROUTERS[kind] in dict(model.named_modules()) and ROUTERS[kind] in dora.report.unmatched_linears
    assert adapted_paths(model) and ROUTERS[kind] not in adapted_paths(model)
    # A gate that scales the output of an expert chooses none.
    assert kind != "gated" or "mlp.shared_expert_gate" in adapted_paths(model)


@every_case(
    ("kind", "targets", "message"),
    [
        ("gemma4", ["proj", "q_proj"], "'proj' matched nothing; it names model.layers.0.router.proj in model.layers.0"),
        ("gemma4", ["*.router.*"], "it names model.layers.0.router.proj in model.layers.0.router, a Gemma4TextRouter"),
        ("gated", ["gate"], "it names mlp.gate, a Linear, whose weight chooses the experts of each token"),
    ],
)
def test_a_pattern_that_names_routers_alone_is_refused(kind: str, targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dora_fx.DoRA(targets, dim=2)(MODELS[kind]())


def test_a_whole_path_names_a_linear_layer_in_a_router() -> None:
    """Files of PEFT may have an adapter of it, which is imported by its path."""
    model = gemma4()
    dora_fx.DoRA(["model.layers.0.router.proj", "q_proj"], dim=2)(model)
    assert [path for path in adapted_paths(model) if "router" in path] == ["model.layers.0.router.proj"]


@every_case(
    ("build", "targets", "message"),
    [
        (dbrx, ["*.ffn.*"], r"ffn.experts.mlp.w1: target '\*.ffn.\*' names a parameter of 64x32, which holds experts"),
        (dbrx, ["Wqkv", "w2"], "ffn.experts.mlp.w2: target 'w2' names a parameter of 64x32, which holds experts"),
        (lambda: tiny_hf_model("qwen3_moe"), ["*gate_proj"], r"experts.gate_up_proj: target '\*gate_proj' names a"),
        (lambda: tiny_hf_model("qwen3_moe"), ["*.mlp.*gate_proj"], r"target '\*.mlp.\*gate_proj' names a parameter"),
    ],
)
def test_experts_of_another_shape_or_spelling_are_refused(build: Any, targets: list[str], message: str) -> None:
    model = build()
    with pytest.raises(TypeError, match=message):
        dora_fx.DoRA(targets, dim=2)(model)
    assert not adapted_paths(model)


def test_experts_that_are_one_matrix_are_reported() -> None:
    dora = dora_fx.DoRA("all-linear", dim=2)
    dora(dbrx())
    assert "2 x transformer.blocks.*.ffn.experts.mlp.w1 (64x32)" in str(dora.report.frozen_experts)


def test_a_regular_expression_is_told_from_a_pattern() -> None:
    with pytest.raises(ValueError, match="patterns have `\\*` for any text, and are no regular expressions"):
        dora_fx.DoRA([r".*self_attn\.(q|k)_proj$"], dim=2)(tiny_hf_model())


def test_files_of_single_experts_do_not_fit_experts_that_are_parameters(tmp_path: Path) -> None:
    hf = tiny_hf_model("qwen3_moe")
    with megatron_world():
        model = dora_fx.DoRA(["*.experts.*"], dim=4)(build_gpt_model(hf.config, hf.state_dict()))
        dora_fx.export_hf(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"expected layers such as .*, and none of single experts, which are param"):
        dora_fx.import_hf(hf, tmp_path / "adapter")


def test_a_check_excuses_experts_without_a_token() -> None:
    tokens = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": tokens,
        "position_ids": torch.arange(6).expand_as(tokens),
        "attention_mask": causal_mask(6, "cpu"),
        "labels": tokens.roll(-1, 1),
    }
    with megatron_world():
        for is_sound in (True, False):
            hf = tiny_hf_model("qwen3_moe", num_experts=16)
            model = dora_fx.DoRA(["*.experts.*"], dim=4)(build_gpt_model(hf.config, hf.state_dict()))
            if not is_sound:
                # One of an expert's tensors gets no gradient, and the others do.
                for name, parameter in model.named_parameters():
                    if ".linear_fc2.adapter.weight_magnitude" in name:
                        parameter.register_hook(torch.zeros_like)
            optimizer = torch.optim.AdamW(dora_fx.parameter_groups(model, lr=1e-2))
            report = dora_fx.check(model, batch, optimizer, raises=False)
            by_name = {finding.name: finding for finding in report.findings}
            assert bool(report.failed) != is_sound, report
            if is_sound:
                assert "of experts without a token are zero" in by_name["gradients"].text
                assert "of experts without a token stay" in by_name["steps"].text
            else:
                assert re.search(r"linear_fc2.adapter.weight_magnitude: found zeros alone", by_name["gradients"].text)
