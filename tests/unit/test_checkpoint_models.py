"""Checkpoints of models that are not uniform: some layers adapted, settings that differ, output layers, biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx.checkpoint.manifest import read_manifest
from tests.models import GPT_TARGETS, randomize_adapters, tiny_gpt
from tests.unit.checkpoints import are_equal, refusal, values

pytestmark = pytest.mark.usefixtures("world")


def attach(*settings: dict) -> Callable[[nn.Module], nn.Module]:
    def adapt(model: nn.Module) -> nn.Module:
        for arguments in settings:
            dora_fx.DoRA(**arguments)(model)
        return model

    return adapt


SOME_LAYERS = attach({"target_modules": ["*.layers.0.*", "*.layers.2.mlp.*"], "dim": 4})
TWO_RANKS = attach(
    {"target_modules": ["*.layers.0.*", "*.layers.1.*"], "dim": 4}, {"target_modules": ["*.layers.2.*"], "dim": 8}
)
TWO_ALPHAS = attach(
    {"target_modules": ["*.layers.0.*", "*.layers.1.*"], "dim": 4, "alpha": 4},
    {"target_modules": ["*.layers.2.*"], "dim": 4, "alpha": 8},
)
WITH_OUTPUT_LAYER = attach({"target_modules": [*GPT_TARGETS, "output_layer"], "dim": 4})

# name -> (adapts, options of the base, layer numbers in keys)
MODELS = {
    "some_layers": (SOME_LAYERS, {}, True),
    "two_ranks": (TWO_RANKS, {}, True),
    "two_alphas": (TWO_ALPHAS, {}, True),
    "untied_output_layer": (WITH_OUTPUT_LAYER, {}, False),
    "tied_output_layer": (WITH_OUTPUT_LAYER, {"tied": True}, False),
    "bias": (WITH_OUTPUT_LAYER, {"add_bias_linear": True}, False),
}


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(3)
    adapt, options, _ = MODELS[name]
    model = adapt(tiny_gpt(num_layers=3, **options))
    randomize_adapters(model, seed)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    path, source, target = tmp_path / "checkpoint", build(name, 1), build(name, 2)
    assert not are_equal(values(target), values(source))
    dora_fx.save_checkpoint(source, path)
    dora_fx.load_checkpoint(target, path)
    assert are_equal(values(target), values(source))
    manifest = read_manifest(path)
    assert manifest.non_homogeneous_layers == MODELS[name][2]
    sites = [path for path, module in source.named_modules() if isinstance(module, dora_fx.DoRALinear)]
    if manifest.non_homogeneous_layers:
        assert sorted(manifest.sites) == sorted(sites)


def test_settings_of_one_layer_differ(tmp_path: Path) -> None:
    dora_fx.save_checkpoint(build("two_alphas", 1), tmp_path / "checkpoint")
    message = refusal(build("two_ranks", 2), tmp_path / "checkpoint")
    assert "was trained with alpha=4, the model has alpha=64" in message


@pytest.mark.parametrize("name", ["some_layers", "two_alphas", "two_ranks"])
def test_layers_adapted_alike_and_not(name: str, tmp_path: Path) -> None:
    """What one key stands for in the checkpoint differs among the model's layers."""
    torch.manual_seed(3)
    alike = dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8)(tiny_gpt(num_layers=3))
    dora_fx.save_checkpoint(alike, tmp_path / "checkpoint")
    message = refusal(build(name, 2), tmp_path / "checkpoint")
    assert "expected one of the same dim and alpha in each, as the checkpoint has" in message
    dora_fx.save_checkpoint(build(name, 2), tmp_path / "checkpoint")
    refusal(alike, tmp_path / "checkpoint")


def test_norms_follow_what_was_loaded(tmp_path: Path) -> None:
    source, target = build("bias", 1), build("bias", 2)
    dora_fx.save_checkpoint(source, tmp_path / "checkpoint")
    tokens = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        before = target(tokens, torch.arange(8)[None], mask)
        dora_fx.load_checkpoint(target, tmp_path / "checkpoint")
        after = target(tokens, torch.arange(8)[None], mask)
        expected = source(tokens, torch.arange(8)[None], mask)
    assert not torch.equal(before, expected)
    assert torch.equal(after, expected)
