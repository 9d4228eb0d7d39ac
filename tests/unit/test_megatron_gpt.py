"""Megatron GPT models built from Hugging Face checkpoints compute what transformers computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_fx.models import UnsupportedModelError, architecture_of, build_gpt_model, causal_mask, load_hf_checkpoint
from dora_fx.models.layer_tensors import hf_layer_names, megatron_layer_tensors, shard_of
from tests.closeness import assert_apart, assert_as_exact, assert_close, rounding, roundings_of
from tests.hf_models import CONFIGS, MOE_CONFIGS, save_tiny_checkpoint, tiny_hf_config, tiny_hf_model
from tests.tables import every_case


def megatron_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, causal_mask(tokens.shape[1], "cpu"))


def hf_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


TOKENS = torch.randint(0, 64, (2, 19), generator=torch.Generator().manual_seed(8))


@every_case("kind", [*CONFIGS, *MOE_CONFIGS])
def test_logits_equal_transformers(kind: str, world: None) -> None:
    hf = tiny_hf_model(kind)
    model = build_gpt_model(hf.config, hf.state_dict())
    expected = hf_logits(hf, TOKENS)
    assert expected.std() > 0.1
    assert_close(megatron_logits(model, TOKENS), expected, rounding(torch.float32, roundings_of(model)))


def test_logits_equal_transformers_in_bfloat16(world: None) -> None:
    hf = tiny_hf_model("qwen2").bfloat16()
    exact = hf_logits(copy.deepcopy(hf).float(), TOKENS)
    model = build_gpt_model(hf.config, hf.state_dict(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_as_exact(megatron_logits(model, TOKENS), hf_logits(hf, TOKENS), exact)


@every_case("kind", ["llama", "qwen2", "phi3"])
def test_zero_query_groups_keep_the_function(kind: str, world: None) -> None:
    hf = tiny_hf_model(kind)
    model = build_gpt_model(hf.config, hf.state_dict(), num_query_groups=4)
    attention = model.decoder.layers[0].self_attention
    assert attention.linear_qkv.weight.shape == (4 * (3 + 2) * 8, 48)
    assert attention.linear_proj.weight.shape == (48, 4 * 3 * 8)
    assert_close(megatron_logits(model, TOKENS), hf_logits(hf, TOKENS), rounding(torch.float32, roundings_of(model)))


def test_fewer_query_groups_than_the_model_has_are_refused(world: None) -> None:
    hf = tiny_hf_model()
    with pytest.raises(ValueError, match="num_query_groups is 1, expected at least the model's 2"):
        build_gpt_model(hf.config, hf.state_dict(), num_query_groups=1)


_QKV = (0, 8), (100, 4), (200, 4)
_INTERLEAVED = [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def _config_of_few_rows(kind: str, intermediate_size: int) -> Any:
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    return tiny_hf_config(kind, **sizes, intermediate_size=intermediate_size)


def test_qkv_rows_are_interleaved_by_query_group() -> None:
    architecture = architecture_of(_config_of_few_rows("llama", intermediate_size=1))
    hf = {name: torch.zeros(1, 1) for name in hf_layer_names(architecture)}
    for name, (begin, rows) in zip("qkv", _QKV, strict=True):
        hf[f"self_attn.{name}_proj.weight"] = torch.arange(begin, begin + rows).float()[:, None]
    fused = megatron_layer_tensors(architecture, hf)["self_attention.linear_qkv.weight"]
    assert fused[:, 0].tolist() == _INTERLEAVED


def test_rows_that_the_checkpoint_fuses_are_interleaved_too() -> None:
    architecture = architecture_of(_config_of_few_rows("phi3", intermediate_size=3))
    hf = {name: torch.zeros(2, 1) for name in hf_layer_names(architecture)}
    hf["self_attn.qkv_proj.weight"] = torch.cat([torch.arange(begin, begin + n) for begin, n in _QKV]).float()[:, None]
    hf["mlp.gate_up_proj.weight"] = torch.arange(6.0)[:, None]
    tensors = megatron_layer_tensors(architecture, hf)
    assert tensors["self_attention.linear_qkv.weight"][:, 0].tolist() == _INTERLEAVED
    assert tensors["mlp.linear_fc1.weight"] is hf["mlp.gate_up_proj.weight"]


def test_shards_of_the_gated_mlp_hold_a_part_of_gate_and_of_up() -> None:
    full = torch.arange(8.0)[:, None]
    shards = [shard_of("decoder.layers.0.mlp.linear_fc1.weight", full, 0, rank, 2) for rank in range(2)]
    assert [shard[:, 0].tolist() for shard in shards] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_row_shard_is_a_block_of_columns() -> None:
    shard = shard_of("decoder.layers.0.mlp.linear_fc2.weight", torch.arange(6.0)[None], 1, 1, 3)
    assert shard.tolist() == [[2, 3]]


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"linear_proj.weight: size 5 of dimension 1 does not divide by 2 ranks"):
        shard_of("linear_proj.weight", torch.zeros(3, 5), 1, 0, 2)


LONGROPE = dict(rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)


@every_case(
    ("kind", "overrides", "message"),
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        ("llama", dict(attention_bias=True), "attention_bias = True"),
        ("llama", dict(mlp_bias=True), "mlp_bias = True"),
        ("mistral", dict(sliding_window=16), "sliding_window = 16"),
        ("mistral", dict(sliding_window=127), "sliding_window = 127, .* at least max_position_embeddings, 128"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "layer_types = "),
        ("phi3", dict(sliding_window=16), "sliding_window = 16"),
        ("mixtral", dict(sliding_window=16), "sliding_window = 16"),
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise = 0.1"),
        ("mixtral", dict(num_experts_per_tok=1), "num_experts_per_tok = 1, .* at least 2"),
        ("qwen3_moe", dict(num_experts_per_tok=5), "num_experts_per_tok = 5, .* from 1 to the 4 experts"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step = 2, .* experts in every layer"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers = \[1\]"),
        ("qwen3_moe", dict(use_sliding_window=True, sliding_window=8), "sliding_window = 8"),
        ("qwen3_moe", dict(output_router_logits=True), "output_router_logits = True"),
        ("phi3", dict(resid_pdrop=0.1), "resid_pdrop = 0.1"),
        ("phi3", dict(embd_pdrop=0.1), "embd_pdrop = 0.1"),
        ("phi3", dict(partial_rotary_factor=0.5), "rope_parameters.partial_rotary_factor = 0.5"),
        # As the configs of long Phi-3 models have it, and as transformers writes it.
        ("phi3", dict(rope_scaling=LONGROPE | dict(type="longrope")), "rope_parameters.rope_type = 'longrope'"),
        ("phi3", dict(rope_parameters=LONGROPE | dict(rope_type="longrope")), "rope_parameters.rope_type = 'longrope'"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
            "rope_parameters.rope_type = 'dynamic'",
        ),
        (
            "llama",
            dict(
                rope_parameters=dict(
                    rope_type="llama3",
                    rope_theta=1e4,
                    factor=8.0,
                    low_freq_factor=2.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=8192,
                )
            ),
            "rope_parameters.low_freq_factor = 2.0",
        ),
    ],
)
def test_unsupported_features_are_named(kind: str, overrides: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        architecture_of(tiny_hf_config(kind, **overrides))


def test_a_window_that_the_longest_text_fits_in_changes_nothing(world: None) -> None:
    """It is on, as a narrow one shows in transformers."""
    kind, size = "mistral", TOKENS.shape[1]
    hf = tiny_hf_model(kind, sliding_window=size, max_position_embeddings=size)
    model = build_gpt_model(hf.config, hf.state_dict())
    expected = hf_logits(hf, TOKENS)
    assert_close(megatron_logits(model, TOKENS), expected, rounding(torch.float32, roundings_of(model)))
    assert_apart(hf_logits(tiny_hf_model(kind, sliding_window=size // 2), TOKENS), expected)


def test_an_unsupported_architecture_is_named() -> None:
    import transformers

    with pytest.raises(UnsupportedModelError, match=r"model_type = 'gpt2', .* expected one of llama"):
        architecture_of(transformers.GPT2Config())


def test_tensors_without_a_place_and_missing_ones_are_named(world: None) -> None:
    hf = tiny_hf_model()
    tensors = dict(hf.state_dict())
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing model.layers.1.mlp.up_proj.weight; .* model.layers.0.*q_proj.bias"):
        build_gpt_model(hf.config, tensors)


def test_a_layer_whose_parts_are_of_other_sizes_is_named(world: None) -> None:
    hf = tiny_hf_model()
    query, key = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")
    tensors = dict(hf.state_dict())
    tensors[query], tensors[key] = torch.zeros(40, 48), torch.zeros(24, 48)
    with pytest.raises(ValueError, match=r"q_proj.weight: found 40 rows, expected 48 of .*linear_qkv's 80"):
        build_gpt_model(hf.config, tensors)


def test_a_directory_loads_with_its_tokenizer(tmp_path: Path, world: None) -> None:
    checkpoint = load_hf_checkpoint(save_tiny_checkpoint(tmp_path / "base", "qwen2"))
    model = build_gpt_model(checkpoint.config, checkpoint.state_dict)
    expected = hf_logits(tiny_hf_model("qwen2"), TOKENS)
    assert_close(megatron_logits(model, TOKENS), expected, rounding(torch.float32, roundings_of(model)))
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer("hello").input_ids).replace(" ", "") == "hello"


def test_a_directory_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_checkpoint(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"base: the tensors are not those of its config: missing lm_head.weight; .* none$"
    ):
        load_hf_checkpoint(folder)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        load_hf_checkpoint(tmp_path / "nowhere")


@pytest.mark.slow
def test_smollm2_computes_what_transformers_computes(world: None) -> None:
    import transformers

    from dora_fx.app.bases.smollm2 import fetch_smollm2

    path = fetch_smollm2()
    checkpoint = load_hf_checkpoint(path)
    model = build_gpt_model(checkpoint.config, checkpoint.state_dict)
    hf = transformers.AutoModelForCausalLM.from_config(checkpoint.config)
    hf.load_state_dict(checkpoint.state_dict)
    tokens = torch.tensor([checkpoint.tokenizer("The capital of France is").input_ids])
    logits = megatron_logits(model, tokens)
    assert_close(logits, hf_logits(hf.eval(), tokens), rounding(torch.float32, roundings_of(model)))
    assert checkpoint.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
