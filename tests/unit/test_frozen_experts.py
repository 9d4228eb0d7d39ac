"""Experts of transformers models are parameters: a target that means them is refused, and a report names them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

import dora_fx
from tests.hf_models import SHAPE, tiny_hf_model
from tests.tables import every_case


def deepseek() -> nn.Module:
    """A dense layer, one of experts, and shared experts, which are layers."""
    config = transformers.DeepseekV3Config(
        **SHAPE,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, pad_token_id=0)
    return transformers.GptOssForCausalLM(config)


def granite() -> nn.Module:
    config = transformers.GraniteMoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    return transformers.GraniteMoeForCausalLM(config)


MODELS = {"qwen3_moe": lambda: tiny_hf_model("qwen3_moe"), "deepseek": deepseek, "gpt_oss": gpt_oss, "granite": granite}


@every_case(
    ("kind", "targets"),
    [
        ("qwen3_moe", ["q_proj", "gate_up_proj"]),
        ("qwen3_moe", ["q_proj", "down_proj"]),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj"]),
        ("qwen3_moe", ["q_proj", "model.layers.0.mlp.experts.3.gate_proj"]),
        ("qwen3_moe", ["*"]),
        # Dense layers and shared experts of these names would be adapted, and the experts not.
        ("deepseek", ["o_proj", "gate_proj"]),
        ("deepseek", ["*.mlp.*"]),
        ("gpt_oss", ["q_proj", "*.experts.*"]),
        ("granite", ["q_proj", "*.experts.*"]),
    ],
)
def test_a_target_that_means_experts_is_refused(kind: str, targets: list[str]) -> None:
    model = MODELS[kind]()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    message = (
        r"experts?\.?\S*: target .* names a parameter of 4x\d+x\d+, which holds 4 experts, expected a linear layer"
    )
    with pytest.raises(TypeError, match=message if kind != "granite" else message.removeprefix(r"experts?\.?\S*")):
        dora_fx.DoRA(targets, dim=4)(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@every_case(
    ("kind", "line"),
    [
        ("qwen3_moe", r"2 x model.layers.\*.mlp.experts.gate_up_proj \(4x80x48\), 2 x .*down_proj \(4x48x40\)"),
        ("deepseek", r"1 x model.layers.\*.mlp.experts.gate_up_proj \(4x80x48\), 1 x .*down_proj \(4x48x40\)"),
        ("gpt_oss", r"2 x model.layers.\*.mlp.experts.gate_up_proj \(4x48x160\), 2 x .*"),
        ("granite", r"2 x model.layers.\*.block_sparse_moe.experts.gate_up_proj \(4x160x48\), 2 x .*"),
    ],
)
def test_a_report_names_the_experts_that_stay_frozen(kind: str, line: str) -> None:
    model = MODELS[kind]()
    dora = dora_fx.DoRA(["all-linear"], dim=4)
    dora(model)
    assert dora.report is not None
    frozen = dora.report.frozen_experts
    assert frozen in str(dora.report).splitlines()
    assert re.search(f"experts are parameters here, not layers, and stay frozen: {line}", str(frozen))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in trained)


def test_excluded_experts_and_a_model_without_any_are_no_matter() -> None:
    model = deepseek()
    dora = dora_fx.DoRA(["gate_proj"], dim=4, exclude_modules=["*.experts.*"])
    dora(model)
    assert dora.report is not None
    assert [site.path for site in dora.report.sites] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.shared_experts.gate_proj",
    ]
    dense = dora_fx.DoRA(["gate_proj"], dim=4)
    dense(tiny_hf_model())
    assert dense.report is not None and dense.report.frozen_experts is None
