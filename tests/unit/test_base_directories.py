"""Hugging Face directories: the tensors in the files decide, and whatever nobody would read is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_fx.models import UnsupportedModelError, build_gpt_model, load_hf_checkpoint
from dora_fx.models.hf_checkpoint import load_hf_config
from tests.hf_models import CONFIGS, save_tiny_checkpoint, tiny_hf_model
from tests.oracle import relative_error
from tests.peft_models import hf_logits, megatron_logits
from tests.tables import every_case

Tensors = dict[str, Tensor]
LAYER = "model.layers.0.self_attn."


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Rewrite the weights; `change` works in place or returns others."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def as_bin(folder: Path) -> Path:
    """The same weights as a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def in_shards(folder: Path, first: Tensors, second: Tensors) -> None:
    """Write two files and an index in place of the weights."""
    (folder / "model.safetensors").unlink()
    names = {}
    for number, part in enumerate((first, second), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        names |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def other_output(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors["lm_head.weight"] = torch.randn(64, 48, generator=generator) / 7


def embedding_as_output(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


def output_alone(tensors: Tensors) -> Tensors:
    return {name.replace("model.embed_tokens", "lm_head"): value for name, value in tensors.items()}


@every_case(("change", "is_tied"), [(other_output, False), (embedding_as_output, True), (output_alone, True)])
@every_case("form", [Path, as_bin])
def test_the_output_layer_is_what_the_tensors_say(
    change: Callable[[Tensors], Any], is_tied: bool, form: Callable[[Path], Path], tmp_path: Path, world: None
) -> None:
    """A config that says `tie_word_embeddings` beside the tensors of either; transformers is the reference."""
    folder = save_tiny_checkpoint(tmp_path / "base", "llama_tied")
    change_tensors(folder, change)
    folder = form(folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert hf.config.tie_word_embeddings
    checkpoint = load_hf_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings == load_hf_config(folder).tie_word_embeddings == is_tied
    model = build_gpt_model(checkpoint.config, checkpoint.state_dict)
    # Sums of some 50 products in float32, two layers deep.
    assert relative_error(megatron_logits(model), hf_logits(hf).double()) <= 1e-5
    # transformers' own config and tensors lead to the same model.
    again = build_gpt_model(hf.config, hf.state_dict())
    assert torch.equal(megatron_logits(again), megatron_logits(model))


@every_case("kind", CONFIGS)
@every_case("form", [Path, as_bin])
def test_tensors_are_read_as_transformers_reads_them(kind: str, form: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = form(save_tiny_checkpoint(tmp_path / "base", kind))
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    found = load_hf_checkpoint(folder, torch.bfloat16).state_dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_shards_and_a_decoder_by_itself_are_read(tmp_path: Path) -> None:
    expected = tiny_hf_model("llama_tied").state_dict()
    folder = save_tiny_checkpoint(tmp_path / "base", "llama_tied")
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    in_shards(folder, {name: whole[name] for name in names[:7]}, {name: whole[name] for name in names[7:]})
    sharded = load_hf_checkpoint(folder).state_dict
    assert sharded.keys() == expected.keys()
    assert all(torch.equal(sharded[name], value) for name, value in expected.items())
    other = save_tiny_checkpoint(tmp_path / "decoder", "llama_tied")
    change_tensors(other, lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()})
    decoder = load_hf_checkpoint(other).state_dict
    assert all(torch.equal(decoder[name], value) for name, value in expected.items())


def added(name: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


def removed(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def renamed(prefix: str) -> Callable[[Tensors], Any]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def as_dtype(name: str, dtype: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: (tensors[name] * 100).to(dtype)})


@every_case(
    ("kind", "change", "message"),
    [
        ("llama", added(f"{LAYER}q_proj.bias", torch.ones(48)), "without a place .*self_attn.q_proj.bias"),
        ("llama", added(f"{LAYER}q_norm.weight", torch.ones(8)), "without a place .*self_attn.q_norm.weight"),
        ("qwen2", added(f"{LAYER}o_proj.bias", torch.ones(48)), "without a place .*self_attn.o_proj.bias"),
        ("qwen3", added(f"{LAYER}sinks", torch.ones(6)), "without a place .*self_attn.sinks"),
        ("llama", added(f"{LAYER}q_proj.weight_scale", torch.ones(1)), "without a place .*q_proj.weight_scale"),
        ("llama", added("model.layers.2.input_layernorm.weight", torch.ones(48)), "without a place .*layers.2"),
        ("llama", added("score.weight", torch.ones(2, 48)), "without a place .*score.weight"),
        ("qwen3", removed(f"{LAYER}k_norm.weight"), "missing .*self_attn.k_norm.weight"),
        ("llama", renamed("base_model.model."), r"missing .*; without a place .*: base_model.model.lm_head.weight"),
        ("llama", renamed("_orig_mod."), r"missing .*; without a place .*: _orig_mod.lm_head.weight"),
        ("llama", as_dtype(f"{LAYER}q_proj.weight", torch.int8), "q_proj.weight is of I8, expected a floating-point"),
        ("llama", as_dtype("lm_head.weight", torch.uint8), "lm_head.weight is of U8, expected a floating-point"),
        (
            "llama",
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(60, 48)}),
            r"lm_head.weight has shape \(60, 48\), expected \(64, 48\)",
        ),
        ("llama", added(f"{LAYER}rotary_emb.inv_freq", torch.ones(4)), "inv_freq holds other frequencies"),
        ("llama", added(f"{LAYER}rotary_emb.inv_freq", torch.ones(3)), "inv_freq holds other frequencies"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(
    kind: str, change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base", kind)
    change_tensors(folder, change)
    for load in (load_hf_checkpoint, load_hf_config):
        with pytest.raises(ValueError, match=message) as raised:
            load(folder)
        assert str(raised.value).startswith(str(folder))


@every_case("kind", ["llama", "llama_rope_llama3", "llama_rope_linear"])
@every_case("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_frequencies_of_old_checkpoints_are_accepted_where_the_config_gives_them(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base", kind)
    frequencies = tiny_hf_model(kind).model.rotary_emb.inv_freq.to(dtype)
    change_tensors(folder, added(f"{LAYER}rotary_emb.inv_freq", frequencies))
    assert load_hf_checkpoint(folder).state_dict.keys() == tiny_hf_model(kind).state_dict().keys()


def test_fewer_layers_in_the_config_than_tensors_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"without a place in the model: model.layers.1.* and 4 more"):
        load_hf_checkpoint(folder)


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    whole = load_file(folder / "model.safetensors")
    in_shards(folder, whole, {"lm_head.weight": torch.zeros(64, 48)})
    message = "model-00002-of-00002.safetensors: found lm_head.weight, which model-00001-of-00002.safetensors has too"
    with pytest.raises(ValueError, match=message):
        load_hf_checkpoint(folder)


@every_case(
    ("weight_map", "message"),
    [
        (
            {"a": "../other.safetensors"},
            r"index.json: found '../other.safetensors' as the name of a file, expected one of this folder; ",
        ),
        ({"a": "/etc/passwd"}, r"index.json: found '/etc/passwd' as the name of a file, expected one of this folder; "),
        (
            {"a": "gone.safetensors"},
            r"gone.safetensors: no such file, although model.safetensors.index.json names it; download it",
        ),
        ({"a": 3}, r"index.json: found 3 as the name of a file, expected one of this folder; "),
        (["a"], r"index.json: found no object weight_map, expected the index of a model; .* download it again"),
    ],
    ids=str,
)
def test_an_index_that_leads_elsewhere_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        load_hf_checkpoint(folder)


def test_a_config_alone_is_enough_for_what_reads_no_weights(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base", "qwen3")
    (folder / "model.safetensors").unlink()
    assert load_hf_config(folder).model_type == "qwen3"


def test_two_sets_of_weights_and_none_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"found model.safetensors and model.safetensors.index.json, expected one"):
        load_hf_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: found no weights, expected one of model.safetensors"):
        load_hf_checkpoint(folder)


@every_case(
    ("fields", "message"),
    [
        (dict(transformers_weights="other.safetensors"), "transformers_weights = 'other.safetensors'"),
        (dict(auto_map={"AutoModelForCausalLM": "modeling.Mine"}), "auto_map.AutoModelForCausalLM = 'modeling.Mine'"),
        (dict(rope_parameters=dict(rope_type="default", type="linear", rope_theta=1e4)), "rope_parameters.type"),
    ],
    ids=str,
)
def test_a_config_that_leads_elsewhere_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    change_config(folder, **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        load_hf_checkpoint(folder)


def test_an_adapter_beside_the_model_is_not_followed(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "base")
    other = save_tiny_checkpoint(tmp_path / "other", seed=9)
    adapter = dict(peft_type="LORA", base_model_name_or_path=str(other))
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(
        ValueError, match=r"base: found adapter_config.json, a PEFT adapter's, .*; expected a model alone, merge it"
    ):
        load_hf_checkpoint(folder)


def test_contradicting_metadata_is_read_as_transformers_reads_it(tmp_path: Path, world: None) -> None:
    """Both of the places that configs have had for the rotary scaling."""
    folder = save_tiny_checkpoint(tmp_path / "base")
    change_config(folder, rope_scaling=dict(type="linear", factor=4.0))
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    checkpoint = load_hf_checkpoint(folder)
    model = build_gpt_model(checkpoint.config, checkpoint.state_dict)
    assert relative_error(megatron_logits(model), hf_logits(hf).double()) <= 1e-5
    assert relative_error(hf_logits(tiny_hf_model()), hf_logits(hf).double()) > 0.1
