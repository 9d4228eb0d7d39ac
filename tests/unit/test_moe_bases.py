"""Bases with experts: directories in the hub's form and in transformers' own, and what is wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_fx.app.bases import check_experts
from dora_fx.app.errors import UserError
from dora_fx.app.options import FinetuneOptions
from dora_fx.hf import save_hf_model
from dora_fx.models import architecture_of, build_gpt_model, load_hf_checkpoint
from dora_fx.models.specs import empty_model
from tests.closeness import assert_close, rounding, roundings_of
from tests.hf_models import tiny_hf_config, tiny_hf_model, tiny_tokenizer
from tests.peft_models import hf_logits, megatron_logits
from tests.tables import every_case

KINDS = ["qwen3_moe", "mixtral"]
EXPERT = {"qwen3_moe": "mlp.experts.3.up_proj", "mixtral": "block_sparse_moe.experts.3.w3"}


def save_base(folder: Path, kind: str, *, fused: bool) -> Path:
    """Write a tiny model as checkpoints on the hub are, or with fused experts."""
    tiny_tokenizer().save_pretrained(folder)
    tiny_hf_model(kind).save_pretrained(folder, save_original_format=not fused)
    return folder


@every_case("kind", KINDS)
def test_both_forms_load_as_the_tensors_of_each_expert_and_compute_the_same(
    kind: str, tmp_path: Path, world: None
) -> None:
    one, other = (
        load_hf_checkpoint(save_base(tmp_path / name, kind, fused=name == "fused")) for name in ("hub", "fused")
    )
    stored = load_file(tmp_path / "hub" / "model.safetensors")
    assert f"model.layers.1.{EXPERT[kind]}.weight" in stored
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    for checkpoint in (one, other):
        assert checkpoint.state_dict.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in checkpoint.state_dict.items())
    model = build_gpt_model(one.config, one.state_dict)
    expected = hf_logits(tiny_hf_model(kind))
    assert_close(megatron_logits(model), expected, rounding(torch.float32, roundings_of(model)))


@every_case("kind", KINDS)
def test_a_model_is_written_in_the_form_of_the_hub(kind: str, tmp_path: Path) -> None:
    checkpoint = load_hf_checkpoint(save_base(tmp_path / "base", kind, fused=True))
    (tmp_path / "to").mkdir()
    save_hf_model(checkpoint, checkpoint.state_dict, tmp_path / "to")
    written = load_file(tmp_path / "to" / "model.safetensors")
    assert written.keys() == checkpoint.state_dict.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in checkpoint.state_dict.items())


@every_case("kind", KINDS)
def test_experts_that_are_not_those_of_the_config_are_named(kind: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", kind, fused=False)
    file, name = folder / "model.safetensors", f"model.layers.1.{EXPERT[kind]}.weight"
    tensors = load_file(file)
    expert = tensors.pop(name)
    for changed, message in (
        (tensors, f"missing {name}; .* none"),
        (
            tensors | {name: expert, name.replace(".3.", ".4."): expert.clone()},
            f"missing none; .* {name[:20]}.*[.]4[.]",
        ),
        (tensors | {name: expert[:1].clone()}, rf"{name} has shape \(1, 48\), expected \({len(expert)}, 48\)"),
        (tensors | {"model.layers.1.mlp.experts.down_proj": torch.zeros(1)}, "missing model.layers.0.mlp.experts."),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_hf_checkpoint(folder)


def test_a_hybrid_model_of_experts_is_refused() -> None:
    architecture = architecture_of(tiny_hf_config("mixtral"))
    with pytest.raises(ValueError, match=r"spec hybrid: found a model with 4 experts in each layer, .* te or local"):
        empty_model(architecture, "hybrid", torch.float32, "cpu", sequence_parallel=False)


@every_case(
    ("kind", "options", "message"),
    [
        (
            "llama",
            dict(dp=2, ep=2, gradient_accumulation=2),
            "--ep: found 2, expected it left out: the base, a llama, has no",
        ),
        ("llama", dict(tp=2, etp=2), "--etp: found 2, expected it left out: the base, a llama, has no experts"),
        ("mixtral", dict(tp=2), "--tp: found 2 for a base with experts, expected --sequence-parallel beside it"),
    ],
)
def test_parallel_sizes_that_are_not_for_the_base_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_experts(tiny_hf_config(kind), FinetuneOptions(demo="text", **options))
    sizes = dict(dp=4, ep=2, gradient_accumulation=4) if kind == "mixtral" else dict(tp=2)
    check_experts(tiny_hf_config(kind), FinetuneOptions(demo="text", **sizes))
