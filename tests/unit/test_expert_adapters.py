"""Adapters of experts in PEFT's files: a layer each, who loads them, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import dora_fx
from dora_fx.models import build_gpt_model
from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.hf_models import tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters
from tests.peft_models import adapted_megatron, adapters, assert_equal, hf_logits, megatron_logits, megatron_of
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

KINDS = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}


class LinearExperts(nn.ModuleList):
    """The experts of a layer as linear layers, which transformers 4 and other implementations have."""

    def __init__(self, fused: Any, names: tuple[str, ...]) -> None:
        gate, up, down = names
        experts = []
        for first, second in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            weights = dict(zip((gate, up, down), (*first.chunk(2), second), strict=True))
            layers = {name: nn.Linear(weight.shape[1], weight.shape[0], bias=False) for name, weight in weights.items()}
            for name, layer in layers.items():
                layer.weight = nn.Parameter(weights[name].detach().clone())
            experts.append(nn.ModuleDict(layers))
        super().__init__(experts)
        self.names = names

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self):
            gate, up, down = (expert[name] for name in self.names)
            tokens, slots = (chosen == number).nonzero(as_tuple=True)
            out = down(functional.silu(gate(x[tokens])) * up(x[tokens]))
            y = y.index_add(0, tokens, out * probabilities[tokens, slots][:, None])
        return y


def with_linear_experts(kind: str) -> nn.Module:
    """The tiny model of other classes, whose type PEFT knows nothing special of."""
    model = tiny_hf_model(kind)
    holder, *names = KINDS[kind]
    for layer in model.model.layers:
        layer.mlp.experts = LinearExperts(layer.mlp.experts, tuple(names))
        if holder != "mlp":
            setattr(layer, holder, layer.mlp)
            # One module under two names would be adapted twice.
            layer.mlp = nn.Identity()
            layer.forward = forward_of(layer, holder)
    model.config.model_type = "with_linear_experts"
    return model


def forward_of(layer: Any, holder: str) -> Any:
    """The layer's own forward, with its experts under another name."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        object.__setattr__(layer, "_modules", {**layer._modules, "mlp": layer._modules[holder]})
        try:
            return type(layer).forward(layer, *args, **kwargs)
        finally:
            layer._modules["mlp"] = nn.Identity()

    return forward


@every_case("kind", KINDS)
def test_peft_loads_them_where_experts_are_linear_layers(kind: str, tmp_path: Path) -> None:
    model, own = adapted_megatron(tiny_hf_model(kind)), with_linear_experts(kind)
    base = hf_logits(own)
    assert_close(base, hf_logits(tiny_hf_model(kind)), rounding(torch.float32, roundings_of(own)))
    dora_fx.export_hf(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["experts"] == "per_expert" and config["use_dora"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    holder, gate, up, _ = KINDS[kind]
    prefix = f"base_model.model.model.layers.1.{holder}.experts.3."
    assert torch.equal(tensors[f"{prefix}{gate}.lora_A.weight"], tensors[f"{prefix}{up}.lora_A.weight"])
    assert tensors[f"{prefix}{up}.lora_magnitude_vector"].shape == (model.config.moe_ffn_hidden_size,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r"Unexpected keyword arguments \['experts'\] for class LoraConfig")
        warnings.filterwarnings("ignore", category=FutureWarning)
        found = peft.PeftModel.from_pretrained(own, str(tmp_path / "adapter"))
    assert_close(hf_logits(found), megatron_logits(model), rounding(torch.float32, roundings_of(found)))
    assert_apart(hf_logits(found), base)


@every_case("kind", KINDS)
def test_fused_experts_refuse_them_aloud(kind: str, tmp_path: Path) -> None:
    """PEFT, transformers' own loader, and import_hf; merging is the way to such a model."""
    model = dora_fx.DoRA(GPT_TARGETS, dim=4)(megatron_of(tiny_hf_model(kind)))
    randomize_adapters(model)
    dora_fx.export_hf(model, tmp_path / "adapter")
    hf = tiny_hf_model(kind)
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
        peft.PeftModel.from_pretrained(copy.deepcopy(hf), str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora=True"):
        copy.deepcopy(hf).load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"found an adapter of .*experts.0.* \(24 without a place in the model\)"):
        dora_fx.import_hf(hf, tmp_path / "adapter")
    merged = dict(dora_fx.iter_merged(model))
    save_file(merged, tmp_path / "model.safetensors", {"format": "pt"})
    hf.config.save_pretrained(tmp_path)
    loaded = type(hf).from_pretrained(tmp_path, attn_implementation="eager")
    assert_close(hf_logits(loaded), megatron_logits(model), rounding(torch.float32, roundings_of(loaded)))


@every_case("kind", KINDS)
def test_they_come_back_bit_by_bit(kind: str, tmp_path: Path) -> None:
    hf = tiny_hf_model(kind)
    model = adapted_megatron(hf)
    dora_fx.export_hf(model, tmp_path / "adapter")
    assert_equal(adapters(dora_fx.import_hf(megatron_of(hf), tmp_path / "adapter")), adapters(model))


def test_a_file_that_lacks_an_expert_or_says_otherwise_is_refused(tmp_path: Path) -> None:
    hf = tiny_hf_model("qwen3_moe")
    folder = tmp_path / "adapter"
    dora_fx.export_hf(adapted_megatron(hf), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"experts": "fused"}))
    with pytest.raises(ValueError, match="experts is 'fused', which is not supported; expected"):
        dora_fx.import_hf(megatron_of(hf), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "experts.2." not in name}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"target_modules names model.layers.0.mlp.experts.2.\S*, which has no tensors"
    ):
        dora_fx.import_hf(megatron_of(hf), folder)
    extra = {name.replace("experts.2.", "experts.7."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | extra, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"found an adapter of model.layers.0.mlp.experts.7.*without a place"):
        dora_fx.import_hf(megatron_of(hf), folder)


def test_a_model_that_does_not_say_its_architecture_has_the_commonest_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf = tiny_hf_model("qwen3_moe")
    model = dora_fx.DoRA(GPT_TARGETS, dim=4)(build_gpt_model(hf.config, hf.state_dict()))
    expected = dict(dora_fx.iter_adapter(model))
    del model.hf_model_type
    assert_equal(dict(dora_fx.iter_adapter(model)), expected)
    assert "its layers were named as those of qwen3_moe" in caplog.text
    with pytest.raises(
        ValueError, match=r"model_type: found 'qwen3' for a model .* num_moe_experts = 4, expected None"
    ):
        dora_fx.export_hf(model, tmp_path / "adapter", model_type="qwen3")
