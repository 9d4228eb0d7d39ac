"""GGUF files: all that they say of the function is honoured, or refused by its key; nothing is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from dora_fx.app.data.base_tokenizer import BaseTokenizer
from dora_fx.models import UnsupportedModelError, load_hf_checkpoint
from dora_fx.models.gguf_config import llama3_divisors
from dora_fx.models.gguf_tensors import open_gguf
from tests.gguf_models import gguf_tensors, write_gguf
from tests.hf_models import CONFIGS, tiny_hf_model
from tests.peft_models import hf_logits
from tests.tables import every_case


def loaded(path: Path) -> torch.nn.Module:
    """The transformers model of what was read."""
    checkpoint = load_hf_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_config(checkpoint.config, attn_implementation="eager")
    model.load_state_dict(checkpoint.state_dict)
    return model


def scaling_of(model: Any) -> dict[str, Any]:
    """What a converter writes of a model's rotary scaling: metadata and tensors."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "llama3":
        divisors = llama3_divisors(rope["rope_theta"], model.config.head_dim, rope["factor"])
        return dict(tensors={"rope_freqs.weight": divisors.astype(np.float32)})
    if rope["rope_type"] == "linear":
        return dict(metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope["factor"]})
    return {}


@every_case("kind", CONFIGS)
def test_every_architecture_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    model = tiny_hf_model(kind)
    found = loaded(write_gguf(tmp_path / "model.gguf", model, **scaling_of(model)))
    assert torch.equal(hf_logits(found), hf_logits(model))
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings


@every_case("kind", ["llama", "llama_tied", "llama_wide_heads", "qwen2", "phi3"])
def test_transformers_reads_the_same_of_a_plain_file(kind: str, tmp_path: Path) -> None:
    # What a file does not state, transformers takes from its classes, whose tokens these models have not.
    metadata = {"tokenizer.ggml.padding_token_id": 0}
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(kind), metadata=metadata)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    checkpoint = load_hf_checkpoint(path)
    assert checkpoint.state_dict.keys() == expected.state_dict().keys()
    assert all(torch.equal(checkpoint.state_dict[name], value) for name, value in expected.state_dict().items())
    found, fields = checkpoint.config.to_dict(), expected.config.to_dict()
    for name in ("rope_parameters", "rms_norm_eps", "vocab_size", "eos_token_id", "bos_token_id"):
        assert found.get(name) == fields.get(name), name


@every_case(
    ("metadata", "rope"),
    [
        ({}, dict(rope_type="default")),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, dict(rope_type="linear", factor=4.0)),
        # llama.cpp's meaning of a factor without a type, and of the key that it had before.
        ({"llama.rope.scaling.factor": 4.0}, dict(rope_type="linear", factor=4.0)),
        ({"llama.rope.scale_linear": 4.0}, dict(rope_type="linear", factor=4.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, dict(rope_type="default")),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, dict(rope_type="default")),
        ({"llama.rope.scaling.factor": 0.0}, dict(rope_type="default")),
        ({"llama.rope.freq_base": None}, dict(rope_type="default", rope_theta=10000.0)),
    ],
    ids=str,
)
def test_rotary_scaling_is_honoured(metadata: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_hf_model("llama", rope_parameters=dict(rope_theta=10000.0) | rope)
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model("llama"), metadata=metadata)
    assert torch.equal(hf_logits(loaded(path)), hf_logits(model))


def test_divisors_of_one_are_no_scaling(tmp_path: Path) -> None:
    model = tiny_hf_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    assert torch.equal(hf_logits(loaded(path)), hf_logits(model))


def test_llama3_divisors_are_transformers_frequencies() -> None:
    """The formula that recognises a file is the converter's; transformers computes the frequencies by itself."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=2048,
        num_attention_heads=16,
        max_position_embeddings=131072,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=5e5,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    # float32 there, float64 here.
    np.testing.assert_allclose(plain / llama3_divisors(5e5, 128, 32.0), expected.numpy(), rtol=1e-6)


REFUSED_METADATA: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "qwen2.rope.scaling.type is 'longrope'"),
    ("llama", {"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor is 1.5"),
    ("llama", {"llama.rope.scaling.yarn_beta_fast": 32.0}, "llama.rope.scaling.yarn_beta_fast is 32.0"),
    ("qwen2", {"qwen2.rope.dimension_count": 4}, "qwen2.rope.dimension_count is 4, .* expected 8"),
    ("llama", {"llama.attention.value_length": 4}, "llama.attention.value_length is 4, .* expected 8"),
    ("llama", {"llama.attention.sliding_window": 16}, "llama.attention.sliding_window is 16"),
    ("phi3", {"phi3.attention.sliding_window": 2047}, "phi3.attention.sliding_window is 2047"),
    ("phi3", {"phi3.rope.scaling.attn_factor": 1.19}, "phi3.rope.scaling.attn_factor is 1.19"),
    ("llama", {"llama.attention.causal": False}, "llama.attention.causal is False"),
    ("llama", {"llama.logit_scale": 8.0}, "llama.logit_scale is 8.0, .* expected 0.0 or 1.0"),
    ("llama", {"llama.embedding_scale": 12.0}, "llama.embedding_scale is 12.0"),
    ("llama", {"llama.expert_count": 8}, "llama.expert_count is 8"),
    ("llama", {"llama.something_new": 8}, "llama.something_new is 8, .* expected no such key"),
    ("llama", {"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv: found \[2, 1\], expected one number"),
    ("llama", {"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon: found no such key, expected one number"),
    ("llama", {"llama.context_length": None}, "llama.context_length: found no such key"),
    ("llama", {"llama.vocab_size": 60}, "llama.vocab_size is 60, .* expected 64, the rows of token_embd.weight"),
    ("llama", {"split.count": 3}, "split.count is 3, .* llama-gguf-split --merge"),
    ("llama", {"general.type": "adapter"}, "general.type is 'adapter', .* expected model"),
]


@every_case(("kind", "metadata", "message"), REFUSED_METADATA, ids=lambda value: str(value)[:50])
def test_what_would_change_the_function_is_refused_by_its_key(
    kind: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(kind), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        load_hf_checkpoint(path)
    assert str(raised.value).startswith(str(path))


@every_case(
    ("kind", "tensors", "message"),
    [
        (
            "llama",
            {"rope_freqs.weight": np.full(4, 2.0, np.float32)},
            "found other divisors of the 4 rotary frequencies in rope_freqs.weight",
        ),
        (
            "llama",
            {"rope_freqs.weight": np.ones(3, np.float32)},
            "found other divisors of the 4 rotary frequencies in rope_freqs.weight",
        ),
        ("llama", {"blk.0.attn_q.bias": np.ones(48, np.float32)}, "without a place in the model: blk.0.attn_q.bias"),
        ("llama", {"blk.1.attn_k_norm.weight": np.ones(8, np.float32)}, "without a place .* blk.1.attn_k_norm.weight"),
        ("llama", {"blk.0.attn_output.scale": np.ones(1, np.float32)}, "without a place .* blk.0.attn_output.scale"),
        ("llama", {"blk.2.attn_norm.weight": np.ones(48, np.float32)}, "without a place .* blk.2.attn_norm.weight"),
        ("qwen2", {"blk.0.attn_output.bias": np.ones(48, np.float32)}, "without a place .* blk.0.attn_output.bias"),
        ("qwen2", {"blk.0.attn_q.bias": None}, "missing model.layers.0.self_attn.q_proj.bias"),
        ("phi3", {"rope_factors_long.weight": np.ones(4, np.float32)}, "without a place .* rope_factors_long.weight"),
        ("llama", {"token_embd.weight": None}, "found no token_embd.weight"),
        ("llama", {"output_norm.weight": np.ones(47, np.float32)}, r"output_norm.weight has shape \(47,\).* \(48,\)"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_tensors_that_the_model_has_no_place_for_are_refused(
    kind: str, tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(kind), tensors=tensors)
    with pytest.raises(ValueError, match=message) as raised:
        load_hf_checkpoint(path)
    assert str(raised.value).startswith(str(path))


def test_scaling_by_type_and_by_tensor_at_once_is_refused(tmp_path: Path) -> None:
    model = tiny_hf_model("llama_rope_llama3")
    metadata = {"llama.rope.scaling.factor": 2.0}
    path = write_gguf(tmp_path / "model.gguf", model, **scaling_of(model), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=r"linear by 2.0.* expected none beside rope_freqs.weight"):
        load_hf_checkpoint(path)


def test_an_output_layer_of_its_own_is_read_also_where_it_equals_the_embedding(tmp_path: Path) -> None:
    tied = tiny_hf_model("llama_tied")
    embedding = gguf_tensors(tied)["token_embd.weight"]
    for name, output in (("same", embedding), ("other", embedding + 1)):
        path = write_gguf(tmp_path / f"{name}.gguf", tied, tensors={"output.weight": output})
        checkpoint = load_hf_checkpoint(path)
        assert not checkpoint.config.tie_word_embeddings
        assert np.array_equal(checkpoint.state_dict["lm_head.weight"].numpy(), output)


def test_all_tokens_that_end_a_turn_end_generation(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 60, "tokenizer.ggml.eom_token_id": 0}
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=metadata)
    assert load_hf_checkpoint(path).config.eos_token_id == [0, 60]


@every_case(("starts", "ends"), [(None, None), (True, None), (True, True), (False, False)])
def test_the_tokens_around_a_text_are_those_that_the_file_states(
    starts: bool | None, ends: bool | None, tmp_path: Path
) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": starts, "tokenizer.ggml.add_eos_token": ends}
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=metadata)
    own = load_hf_checkpoint(path).tokenizer
    tokens = BaseTokenizer(path, own, vocab_size=64).documents(["the a"])
    assert own.convert_ids_to_tokens(tokens.tolist()) == ["<b>"] * bool(starts) + ["th", "e", "\u0120", "a", "<e>"]


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"general.architecture is 'gemma3', .* one of llama, qwen2, qwen3"):
        load_hf_checkpoint(tmp_path / "model.gguf")


@every_case("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_quantised_tensors_have_the_values_that_gguf_gives_them(kind: str, tmp_path: Path) -> None:
    model = tiny_hf_model("llama", hidden_size=64, num_attention_heads=8)
    path, quantisation = tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]
    weight = gguf_tensors(model)["blk.0.ffn_gate.weight"]
    packed = gguf.quantize(weight, quantisation)
    write_gguf(path, model, tensors={"blk.0.ffn_gate.weight": packed}, quantisations={"blk.0.ffn_gate.weight": kind})
    assert open_gguf(path).tensors["blk.0.ffn_gate.weight"].tensor_type == quantisation
    found = load_hf_checkpoint(path).state_dict["model.layers.0.mlp.gate_proj.weight"]
    assert np.array_equal(found.numpy(), gguf.dequantize(packed, quantisation))
    assert not np.array_equal(found.numpy(), weight)
