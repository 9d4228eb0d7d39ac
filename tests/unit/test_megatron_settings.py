"""Settings of a Megatron model that no Hugging Face layer here has are refused by name wherever rows are dealt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.activations import quick_gelu, squared_relu
from torch import nn
from torch.nn import functional

import dora_fx
from dora_fx.models import build_gpt_model, causal_mask, megatron_settings
from dora_fx.models.hf_architectures import HF_ARCHITECTURES
from dora_fx.models.hf_parts import HFParts
from dora_fx.models.megatron_settings import check_settings, unknown_settings
from tests.closeness import rounding, roundings_of
from tests.hf_models import tiny_hf_model
from tests.models import SEQUENCE, randomize_adapters, tiny_gpt, token_ids
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

# Built by Megatron itself, each differs in one setting from a model whose layers have names.
BUILT: dict[str, tuple[dict[str, Any], str]] = {
    "gate": (
        dict(attention_output_gate=True),
        "attention_output_gate = True, expected False as in every supported arch",
    ),
    "offset": (dict(glu_linear_offset=1.0), r"glu_linear_offset = 1\.0, expected 0\.0 as in every supported arch"),
    "clamp": (dict(activation_func_clamp_value=7.0), r"activation_func_clamp_value = 7\.0, expected None"),
    "gelu": (dict(activation_func=functional.gelu), "activation_func = gelu, expected silu"),
    "quick_gelu": (dict(activation_func=quick_gelu), "activation_func = quick_gelu, expected silu"),
    "no_gate": (dict(gated_linear_unit=False), "gated_linear_unit = False, expected True"),
    "relu": (dict(gated_linear_unit=False, activation_func=squared_relu), "gated_linear_unit = False, expected True"),
    "biases": (dict(add_bias_linear=True), "add_bias_linear = True, expected False"),
    "layer_norm": (dict(normalization="LayerNorm"), "normalization = 'LayerNorm', expected 'RMSNorm'"),
    "residual": (dict(apply_residual_connection_post_layernorm=True), "post_layernorm = True, expected False"),
    "interleaved": (dict(rotary_interleaved=True), "rotary_interleaved = True, expected False"),
    "no_rope": (dict(no_rope_freq=2), r"no_rope_freq = .*, expected None or 0"),
    "scale": (dict(softmax_scale=1.0), r"softmax_scale = 1\.0, expected None or 0\.353553, 1 / sqrt\(kv_channels\)"),
    "l2": (dict(qk_l2_norm=True), "qk_l2_norm = True, expected False"),
}
# Said by a configuration alone: what builds the layers is elsewhere, or only of one end of the range of versions.
SAID: dict[str, tuple[Any, str]] = {
    "softmax_type": ("off-by-one", "softmax_type = 'off-by-one', expected 'vanilla'"),
    "multi_latent_attention": (True, "multi_latent_attention = True, expected False"),
    "experimental_attention_variant": (
        "gated_delta_net",
        "experimental_attention_variant = 'gated_delta_net', expected",
    ),
    "linear_attention_freq": (4, "linear_attention_freq = 4, expected None"),
    "heterogeneous_block_specs": (True, "heterogeneous_block_specs = True, expected False"),
    "mrope_section": ([1, 1, 2], r"mrope_section = \[1, 1, 2\], expected None"),
    "use_mup": (True, "use_mup = True, expected False"),
}


# The same of a model with experts.
SAID_OF_EXPERTS: dict[str, tuple[Any, str]] = {
    "moe_layer_freq": ([1, 0], r"moe_layer_freq = \[1, 0\], expected 1, experts in every layer"),
    "moe_router_load_balancing_type": ("sinkhorn", "moe_router_load_balancing_type = 'sinkhorn', expected some of"),
    "moe_router_score_function": ("sigmoid", "moe_router_score_function = 'sigmoid', expected 'softmax'"),
    "moe_router_enable_expert_bias": (True, "moe_router_enable_expert_bias = True, expected False"),
    "moe_shared_expert_intermediate_size": (8, "moe_shared_expert_intermediate_size = 8, expected None"),
    "moe_mlp_glu_interleave_size": (8, "moe_mlp_glu_interleave_size = 8, expected None"),
    "moe_latent_size": (8, "moe_latent_size = 8, expected None"),
}


def adapted(model: nn.Module) -> nn.Module:
    return dora_fx.DoRA(["linear_qkv", "linear_fc1", "linear_fc2"], dim=4)(model)


def state(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def refuse(model: nn.Module, message: str, folder: Path, adapter: Path) -> None:
    """Every way out of a model refuses it, and the way in, before anything is written or changed."""
    with pytest.raises(ValueError, match=message):
        dora_fx.import_hf(model, adapter)
    assert not any("adapter" in name for name, _ in model.named_parameters())
    model = adapted(model)
    before = state(model)
    for call in (
        lambda: dora_fx.export_hf(model, folder / "out"),
        lambda: dict(dora_fx.iter_adapter(model)),
        lambda: dict(dora_fx.iter_merged(model)),
        lambda: dora_fx.import_hf(model, adapter),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not (folder / "out").exists()
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the model that all others differ from."""
    dora_fx.export_hf(adapted(tiny_gpt()), tmp_path / "adapter")
    return tmp_path / "adapter"


@every_case("name", BUILT)
def test_a_model_that_computes_something_else_is_refused_by_the_setting(
    name: str, tmp_path: Path, adapter: Path
) -> None:
    settings, message = BUILT[name]
    refuse(tiny_gpt(**settings), message, tmp_path, adapter)


@every_case("name", SAID)
def test_a_setting_that_a_configuration_has_is_refused(name: str, tmp_path: Path, adapter: Path) -> None:
    value, message = SAID[name]
    model = tiny_gpt()
    adapted_model = adapted(tiny_gpt())
    for each in (model, adapted_model):
        setattr(each.config, name, value)
    with pytest.raises(ValueError, match=message):
        dora_fx.import_hf(model, adapter)
    for call in (
        lambda: dora_fx.export_hf(adapted_model, tmp_path / "out"),
        lambda: dora_fx.iter_merged(adapted_model),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "out").exists()


@every_case("name", SAID_OF_EXPERTS)
def test_a_setting_of_experts_is_refused(name: str) -> None:
    value, message = SAID_OF_EXPERTS[name]
    hf = tiny_hf_model("mixtral")
    model = build_gpt_model(hf.config, hf.state_dict())
    check_settings(model.config, model)
    model.config.moe_layer_freq, model.config.moe_router_load_balancing_type = [1, 1], ["seq_aux_loss", "aux_loss"]
    check_settings(model.config, model)
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        check_settings(model.config, model)


@every_case(
    ("chunk", "message"),
    [
        (
            dict(position_embedding_type="learned_absolute"),
            "position_embedding_type = 'learned_absolute', expected 'rope'",
        ),
        (dict(position_embedding_type="none"), "position_embedding_type = 'none', expected 'rope' or 'yarn'"),
        (dict(rotary_percent=0.5), r"rotary_percent = 0\.5, expected 1\.0"),
    ],
)
def test_other_positions_are_refused(chunk: dict[str, Any], message: str, tmp_path: Path, adapter: Path) -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    like = tiny_gpt()
    settings: dict[str, Any] = dict(position_embedding_type="rope") | chunk
    model = GPTModel(
        config=like.config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=like.vocab_size,
        max_sequence_length=like.max_sequence_length,
        **settings,
    )
    refuse(model, message, tmp_path, adapter)


@every_case(
    "settings",
    [
        dict(softmax_scale=8**-0.5),
        dict(num_query_groups=None),
        dict(kv_channels=16),
        dict(attention_softmax_in_fp32=False),
        dict(apply_query_key_layer_scaling=True),
        dict(window_size=(3, 0)),
        dict(activation_func=functional.silu, bias_activation_fusion=False),
        dict(hidden_dropout=0.3, attention_dropout=0.1, qk_clip=True),
        dict(fp32_residual_connection=True, layernorm_epsilon=1e-6, init_method_std=0.5),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_leave_rows_and_function_alone_are_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(tiny_gpt(**settings))
    dora_fx.export_hf(model, tmp_path / "out")
    rows = {name.split(".")[-2]: len(value) for name, value in dora_fx.iter_merged(model) if "_proj.weight" in name}
    config = model.config
    assert rows["q_proj"] == config.num_attention_heads * config.kv_channels
    assert rows["k_proj"] == rows["v_proj"] == config.num_query_groups * config.kv_channels
    dora_fx.import_hf(tiny_gpt(**settings), tmp_path / "out")


def test_compare_merged_takes_every_setting() -> None:
    """It runs the model itself, and gives no row to a layer of Hugging Face."""
    model = adapted(tiny_gpt(attention_output_gate=True, glu_linear_offset=1.0, activation_func_clamp_value=7.0))
    randomize_adapters(model)
    tokens, positions = token_ids(), torch.arange(SEQUENCE).expand(2, -1)
    found = dora_fx.compare_merged(model, tokens, positions, causal_mask(SEQUENCE, "cpu"), labels=tokens)
    assert len(found.layers) == 6 and all(layer.change > 0 for layer in found.layers)
    assert found.num_tokens == tokens.numel() and found.mean_gap < rounding(torch.float32, roundings_of(model))


def test_every_setting_of_the_installed_megatron_is_known() -> None:
    """A new one is looked at, and goes into one of the tables."""
    assert list(unknown_settings()) == []


def test_a_setting_that_is_not_known_is_refused_unless_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt(qk_clip=True)
    check_settings(model.config, model)
    monkeypatch.setattr(megatron_settings, "_KNOWN", megatron_settings._KNOWN - {"qk_clip", "qk_clip_alpha"})
    with pytest.raises(
        ValueError, match="qk_clip = True, a setting that is not known here, expected False, its default"
    ):
        check_settings(model.config, model)
    model.config.qk_clip = False
    check_settings(model.config, model)


def test_rows_that_the_configuration_does_not_have_are_refused() -> None:
    """Whatever makes a fused layer larger than its heads say, it is not split as if it did not."""
    parts = HFParts.of(HF_ARCHITECTURES["llama"], tiny_gpt().config)
    # Two groups of two queries, a key and a value of eight.
    assert [len(rows) for rows in parts.row_parts("self_attention.linear_qkv", 64)] == [32, 16, 16]
    assert [len(rows) for rows in parts.row_parts("self_attention.linear_qkv", 32)] == [16, 8, 8]
    with pytest.raises(
        ValueError, match="found 96 rows, expected 32 of each query group, of which there are at most 2"
    ):
        parts.row_parts("self_attention.linear_qkv", 96)
    with pytest.raises(ValueError, match="found 98 rows, expected 96, twice ffn_hidden_size for gate and up"):
        parts.row_parts("mlp.linear_fc1", 98)


def test_a_type_of_model_is_that_of_its_norms_and_biases(tmp_path: Path) -> None:
    model = adapted(tiny_gpt())
    for model_type, message in (
        ("qwen3", "qk_layernorm = False, expected True"),
        ("qwen2", "add_qkv_bias = False, exp"),
    ):
        with pytest.raises(
            ValueError, match=f"model_type: found '{model_type}' for a model whose config has {message}"
        ):
            dora_fx.export_hf(model, tmp_path / "out", model_type=model_type)
        with pytest.raises(ValueError, match=f"whose config has {message}"):
            dora_fx.iter_adapter(model, model_type=model_type)
    assert not (tmp_path / "out").exists()
