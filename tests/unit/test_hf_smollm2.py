"""SmolLM2 itself, with an adapter away from the identity: PEFT, transformers and Megatron compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import dora_fx
from dora_fx.app.bases.smollm2 import fetch_smollm2
from dora_fx.hf.merged_model import merged_state_dict, save_hf_model
from dora_fx.hf.peft_files import PeftModule
from dora_fx.hf.peft_reader import read_peft_adapter
from dora_fx.models import load_hf_checkpoint
from tests.closeness import assert_apart
from tests.models import GPT_TARGETS, sites
from tests.peft_models import assert_same_logits, hf_logits, load_with_peft, megatron_logits, megatron_of


@torch.no_grad()
def move_as_training_does(model: torch.nn.Module) -> None:
    """B not zero and magnitudes within a tenth of the norm: a model that still computes something."""
    generator = torch.Generator().manual_seed(6)
    for site in sites(model).values():
        lora_b, magnitude = site.adapter.linear_out.weight, site.adapter.weight_magnitude
        lora_b.copy_(torch.randn(lora_b.shape, generator=generator) * 0.02)
        magnitude.copy_(site._get_weight_norm() * (0.9 + 0.2 * torch.rand(magnitude.shape, generator=generator)))


@pytest.mark.slow
def test_smollm2_goes_to_hugging_face_and_back(world: None, tmp_path: Path) -> None:
    checkpoint = load_hf_checkpoint(fetch_smollm2())
    hf = transformers.AutoModelForCausalLM.from_config(checkpoint.config)
    hf.load_state_dict(checkpoint.state_dict)
    model = dora_fx.DoRA(GPT_TARGETS, dim=16, alpha=32)(megatron_of(hf))
    move_as_training_does(model)
    tokens = torch.tensor([checkpoint.tokenizer("The capital of France is Paris. The capital of Italy").input_ids])
    logits = megatron_logits(model, tokens)
    assert_apart(logits, hf_logits(hf, tokens))

    dora_fx.export_hf(model, tmp_path / "peft", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert_same_logits(hf_logits(load_with_peft(hf, tmp_path / "peft"), tokens), logits, model)

    adapter = read_peft_adapter(tmp_path / "peft")
    names = ("lora_a", "lora_b", "magnitude")
    modules = {path: PeftModule(*(adapter.tensor(path, name) for name in names), alpha=32.0) for path in adapter.shapes}
    save_hf_model(checkpoint, merged_state_dict(checkpoint, modules), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_logits(hf_logits(merged, tokens), logits, model)

    again = dora_fx.import_hf(megatron_of(hf), tmp_path / "peft")
    trained = {name: value for name, value in model.named_parameters() if ".adapter." in name}
    assert all(torch.equal(again.get_parameter(name), value) for name, value in trained.items())
    dora_fx.merge(again)
    assert_same_logits(megatron_logits(again, tokens), logits, model)
