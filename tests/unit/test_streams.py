"""Streams of adapters and of merged weights are bitwise what export and merge give, and leave the model alone."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dora_fx
from benchmarks.measuring import peak_bytes
from dora_fx.models import build_gpt_model
from tests.hf_models import CONFIGS, tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters, sites, tiny_gpt
from tests.peft_models import (
    adapted_megatron,
    assert_same_logits,
    hf_logits,
    load_with_peft,
    megatron_logits,
)
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

KINDS = ["llama", "llama_tied", "qwen2", "qwen3", "phi3"]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_kinds_are_those_of_every_architecture() -> None:
    assert {CONFIGS[kind][0] for kind in [*KINDS, "mistral"]} == {config for config, _ in CONFIGS.values()}


@every_case("kind", KINDS)
def test_adapters_are_those_of_the_exported_file(kind: str, tmp_path: Path) -> None:
    model = adapted_megatron(tiny_hf_model(kind))
    before = state(model)
    found = list(dora_fx.iter_adapter(model))
    dora_fx.export_hf(model, tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == len(expected)
    assert_equal(dict(found), expected)
    assert_equal(state(model), before)


@every_case("dtype", [torch.float32, torch.bfloat16])
@every_case("kind", KINDS)
def test_merged_weights_are_those_of_merge(kind: str, dtype: torch.dtype) -> None:
    hf = tiny_hf_model(kind).to(dtype)
    model = adapted_megatron(hf, dtype=dtype)
    before = state(model)
    found = dict(dora_fx.iter_merged(model))
    assert_equal(state(model), before)
    assert found.keys() == hf.state_dict().keys() - ({"lm_head.weight"} if hf.config.tie_word_embeddings else set())
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in found.values())
    rebuilt = build_gpt_model(hf.config, found, dtype=dtype)
    assert_equal(state(rebuilt), state(dora_fx.merge(model)))


@every_case("kind", KINDS)
def test_transformers_computes_with_the_stream_what_peft_does(kind: str, tmp_path: Path) -> None:
    hf = tiny_hf_model(kind)
    model = adapted_megatron(hf)
    dora_fx.export_hf(model, tmp_path / "adapter")
    peft_model = load_with_peft(hf, tmp_path / "adapter")
    expected = hf_logits(peft_model)
    missing = hf.load_state_dict(dict(dora_fx.iter_merged(model)), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    assert_same_logits(hf_logits(hf), expected, peft_model)


def test_a_stream_of_another_dtype_is_rounded_once() -> None:
    model = adapted_megatron(tiny_hf_model("llama"))
    whole, rounded = dict(dora_fx.iter_merged(model)), dict(dora_fx.iter_merged(model, dtype=torch.bfloat16))
    assert list(rounded) == list(whole)
    assert_equal(rounded, {name: tensor.bfloat16() for name, tensor in whole.items()})


def test_a_padded_vocabulary_is_cut() -> None:
    model = dora_fx.DoRA(GPT_TARGETS, dim=4)(tiny_gpt())
    randomize_adapters(model)
    found = dict(dora_fx.iter_merged(model, vocab_size=50, model_type="llama"))
    assert found["model.embed_tokens.weight"].shape[0] == 50


def test_refusals_come_at_once() -> None:
    untouched = tiny_gpt()
    for stream in (dora_fx.iter_adapter, dora_fx.iter_merged):
        with pytest.raises(ValueError, match="found no adapted layer"):
            stream(untouched)
    tied = dora_fx.DoRA(["output_layer"], dim=4)(tiny_gpt(tied=True))
    with pytest.raises(ValueError, match="output_layer: the layer multiplies by the embedding's weight"):
        dora_fx.iter_merged(tied)
    more = dora_fx.DoRA(GPT_TARGETS, dim=4)(tiny_gpt())
    more.decoder.layers[0].scale = nn.Module()
    more.decoder.layers[0].scale.register_parameter("gain", nn.Parameter(torch.ones(3), requires_grad=False))
    with pytest.raises(ValueError, match=r"decoder.layers.0.scale: found parameters gain, which have no name"):
        dora_fx.iter_merged(more)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen2", "found 'qwen2' for a model whose config has add_qkv_bias = False, expected True"),
        ("qwen3", "found 'qwen3' for a model whose config has qk_layernorm = False, expected True"),
    ],
)
def test_what_a_model_of_that_type_has_is_missed(model_type: str, message: str) -> None:
    model = dora_fx.DoRA(GPT_TARGETS, dim=4)(tiny_gpt())
    with pytest.raises(ValueError, match=message):
        dora_fx.iter_merged(model, model_type=model_type)


@pytest.mark.parametrize("fails", [False, True])
def test_merged_for_a_while(fails: bool) -> None:
    model = adapted_megatron(tiny_hf_model("llama"))
    before, expected = state(model), megatron_logits(model)
    adapters = [site.adapter for site in sites(model).values()]
    try:
        with dora_fx.merged(model) as inside:
            assert inside is model and not sites(model)
            assert_same_logits(megatron_logits(model), expected, model)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert_equal(state(model), before)
    assert [site.adapter for site in sites(model).values()] == adapters
    assert torch.equal(megatron_logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapt", ["megatron", "transformers"])
def test_streams_need_memory_for_one_layer(adapt: str, dtype: torch.dtype) -> None:
    """Whoever takes a stream and keeps none of it has one layer more than the model in memory, however deep that is."""
    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=16)
    hf = tiny_hf_model("llama", **sizes).to(dtype)
    model = adapted_megatron(hf, dtype=dtype) if adapt == "megatron" else dora_fx.DoRA("all-linear", dim=4)(hf)
    randomize_adapters(model)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    linears = [site.base_weight.numel() for site in sites(model).values()]
    adapters = [sum(p.nbytes for p in site.adapter.parameters()) for site in sites(model).values()]
    peaks = {}
    for name, iterate in (("merged", dora_fx.iter_merged), ("adapter", dora_fx.iter_adapter)):
        peaks[name] = peak_bytes(lambda iterate=iterate: deque(iterate(model), maxlen=0), "cpu")
        print(f"{adapt} {dtype}: {name} {peaks[name]:,} bytes beyond the {whole:,} of the model")
    # In float32 the base weight, the product and their sum, and what is sent; 64 KiB for indices and adapters.
    assert peaks["merged"] <= 4 * max(linears) * 4 + 2**16 < whole / 4
    # Of the layers of one transformer layer, as they are and dealt out.
    assert peaks["adapter"] <= 8 * max(adapters) + 2**16 < whole / 4
