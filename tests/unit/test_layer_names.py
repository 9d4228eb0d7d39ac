"""Targets that another library has names for: the error says first what this model calls the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn

import dora_fx
from tests.hf_models import tiny_hf_model
from tests.models import sites, tiny_gpt
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")


def gpt() -> nn.Module:
    return tiny_gpt(num_layers=1)


def neox() -> nn.Module:
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=16, **sizes))


@every_case(
    ("build", "target", "called"),
    [
        (gpt, "q_proj", "linear_qkv"),
        (gpt, "*.layers.0.*.v_proj", "linear_qkv"),
        (gpt, "c_attn", "linear_qkv"),
        (gpt, "query_key_value", "linear_qkv"),
        (gpt, "o_proj", "linear_proj"),
        (gpt, "out_proj", "linear_proj"),
        (gpt, "gate_proj", "linear_fc1"),
        (gpt, "up_proj", "linear_fc1"),
        (gpt, "gate_up_proj", "linear_fc1"),
        (gpt, "down_proj", "linear_fc2"),
        (gpt, "c_proj", "linear_proj and linear_fc2"),
        (gpt, "lm_head", "output_layer"),
        (tiny_hf_model, "linear_qkv", "q_proj and k_proj and v_proj"),
        (tiny_hf_model, "linear_fc1", "gate_proj and up_proj"),
        (lambda: tiny_hf_model("phi3"), "q_proj", "qkv_proj"),
        (neox, "k_proj", "query_key_value"),
        (neox, "linear_fc2", "dense_4h_to_h"),
    ],
)
def test_the_name_here_comes_first(build: Callable[[], Any], target: str, called: str) -> None:
    model = build()
    with pytest.raises(ValueError) as error:
        dora_fx.DoRA([target], dim=2)(model)
    expected = f"no module matched ['{target}']; in this model '{target}' is called {called}"
    assert str(error.value) == f"DoRA.target_modules: {expected}"
    assert not sites(model)


@every_case(
    ("settings", "message"),
    [
        (
            dict(target_modules=["q_proj", "o_proj"]),
            "no module matched ['q_proj', 'o_proj']; in this model 'q_proj' is called linear_qkv, 'o_proj' is called "
            "linear_proj",
        ),
        (
            dict(target_modules=["linear_qkv", "up_proj"]),
            "'up_proj' matched nothing; in this model 'up_proj' is called linear_fc1",
        ),
        (
            dict(target_modules=["linear_qkv"], rank_pattern={"q_proj": 4}),
            "DoRA.rank_pattern: 'q_proj' decides for no adapted layer, expected a name, path or pattern of one that no "
            "pattern before it names; in this model 'q_proj' is called linear_qkv",
        ),
        (
            dict(target_modules=["linear_qvk"]),
            "no module matched ['linear_qvk']; the nearest linear layers are ['linear_qkv'",
        ),
    ],
)
def test_several_names_and_patterns_of_ranks(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        dora_fx.DoRA(dim=2, **settings)(gpt())
    assert message in str(error.value)
