"""The other libraries' formulas that benchmarks compare with are these libraries', and the same function."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from dora_fx import DoRALinear
from tests.closeness import assert_close
from tests.models import randomize_adapters, sites
from tests.tables import every_case

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import variants

TARGETS = ["linear_fc1", "linear_fc2"]
SIZES = (24, 40)
DIM = 6

pytestmark = pytest.mark.usefixtures("world")


def with_formula(model: nn.Module, linear: type[variants.LoRALinear]) -> nn.Module:
    """The adapted model, in which another formula computes with its parameters and a copy of the magnitude."""
    for path, site in sites(model).items():
        other = linear(site)
        other.magnitude.data.copy_(site.adapter.weight_magnitude)
        setattr(model, path, other)
    return model


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)[0]
    output.square().sum().backward()
    found = {"output": output, "dx": x.grad}
    for path, module in model.named_modules():
        if isinstance(module, DoRALinear):
            adapter = module.adapter
            parameters = (adapter.linear_in.weight, adapter.linear_out.weight, adapter.weight_magnitude)
        elif isinstance(module, variants.LoRALinear):
            parameters = (module.lora_a, module.lora_b, module.magnitude)
        else:
            continue
        found |= {f"{path} {name}": parameter.grad for name, parameter in zip("ABm", parameters, strict=True)}
    return found


@every_case("linear", [variants.MegatronBridgeLikeLinear, variants.PEFTLikeLinear])
def test_each_formula_is_the_same_function(linear):
    model = variants.with_dora(variants.gated_mlp(*SIZES, torch.float64, "cpu"), DIM, TARGETS)
    randomize_adapters(model)
    x = torch.randn(5, 1, SIZES[0], dtype=torch.float64)
    expected = results(model, x)
    assert len(expected) == 2 + 2 * 3
    assert_close(results(with_formula(model, linear), x), expected, 1e-12)


def test_pefts_formula_is_pefts():
    """Bit by bit: the norm, and what a layer of PEFT computes."""
    model = variants.with_dora(variants.gated_mlp(*SIZES, torch.float32, "cpu"), DIM, TARGETS)
    randomize_adapters(model)
    with_formula(model, variants.PEFTLikeLinear)
    plain = variants.with_peft(variants.PlainGatedMLP(*SIZES, torch.float32, "cpu"), DIM, TARGETS)
    for name in TARGETS:
        ours, theirs = model.get_submodule(name), plain.get_submodule(f"base_model.model.{name}")
        theirs.base_layer.weight.data.copy_(ours.to_wrap.weight)
        theirs.lora_A["default"].weight.data.copy_(ours.lora_a)
        theirs.lora_B["default"].weight.data.copy_(ours.lora_b)
        dora: DoraLinearLayer = theirs.lora_magnitude_vector["default"]
        dora.weight.data.copy_(ours.magnitude)
        assert theirs.scaling["default"] == ours.scaling
        update = dora.get_lora_weight(theirs.lora_A["default"], theirs.lora_B["default"])
        norm = dora.get_weight_norm(theirs.base_layer.weight, update, ours.scaling)
        assert torch.equal(norm, ours._norm()), name
        x = torch.randn(5, 1, ours.lora_a.shape[1])
        assert torch.equal(theirs(x), ours(x)[0]), name


def test_a_whole_layer_is_causal_and_has_all_targets():
    layer = variants.WholeLayer(32, 48, 4, 2, 6, torch.float32, "cpu")
    adapted = variants.with_dora(layer, DIM, ["linear_qkv", "linear_proj", *TARGETS])
    assert len(sites(adapted)) == 4
    x = torch.randn(6, 1, 32)
    later = x.clone()
    later[4:] += 1.0
    outputs = [adapted(tensor)[0] for tensor in (x, later)]
    assert torch.equal(outputs[0][:4], outputs[1][:4]) and not torch.equal(outputs[0][4:], outputs[1][4:])
