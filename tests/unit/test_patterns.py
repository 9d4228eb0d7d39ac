"""Ranks and alphas by patterns, rsLoRA, and learning-rate ratios: attached, saved, loaded and exchanged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

import dora_fx
from dora_fx.checkpoint import read_adapters
from dora_fx.checkpoint.manifest import MANIFEST, _checksum
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.hf_models import tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters, sites, tiny_gpt
from tests.peft_models import assert_same_logits, hf_logits, load_with_peft, megatron_logits, megatron_of
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

PATTERNS: dict[str, Any] = dict(
    rank_pattern={"linear_proj": 2, "*.layers.1.*": 6},
    alpha_pattern={"decoder.layers.0.mlp.linear_fc1": 5, "linear_qkv": 9.5},
)
QKV, PROJ, FC1 = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1"


def fresh_gpt() -> nn.Module:
    """The same base every time."""
    torch.manual_seed(0)
    return tiny_gpt()


def optimizer_of(model: nn.Module, config: OptimizerConfig, **ratios: float) -> Any:
    with cuda_means_cpu():
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        return get_megatron_optimizer(config, [wrapped], config_overrides=dora_fx.config_overrides(config, **ratios))


def patterned(model: nn.Module, **options: Any) -> nn.Module:
    dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8, **(PATTERNS | options))(model)
    randomize_adapters(model)
    return model


def settings_of(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {path: (site.adapter.dim, site.adapter.alpha) for path, site in sites(model).items()}


def test_the_first_pattern_that_names_a_layer_counts() -> None:
    found = settings_of(patterned(fresh_gpt()))
    assert found[f"decoder.layers.0.{QKV}"] == (4, 9.5)
    assert found[f"decoder.layers.1.{QKV}"] == (6, 9.5)
    assert [found[f"decoder.layers.{layer}.{PROJ}"] for layer in (0, 1)] == [(2, 8), (2, 8)]
    assert [found[f"decoder.layers.{layer}.{FC1}"] for layer in (0, 1)] == [(4, 5), (6, 8)]


def test_a_second_call_compares_each_layer() -> None:
    model = patterned(fresh_gpt())
    before = [parameter.clone() for parameter in model.parameters()]
    patterned_again = dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8, **PATTERNS)
    patterned_again(model)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match=r"layers\.1\..*: already adapted with dim=6, this configuration has dim=4"):
        dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8, **(PATTERNS | dict(rank_pattern={"linear_proj": 2})))(model)
    with pytest.raises(ValueError, match="already adapted with use_rslora=False, this configuration has"):
        dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8, use_rslora=True, **PATTERNS)(model)


@every_case(
    ("options", "idle"),
    [
        (dict(rank_pattern={"linear_qvk": 8}), "DoRA.rank_pattern: 'linear_qvk'"),
        (dict(alpha_pattern={"output_layer": 8}), "DoRA.alpha_pattern: 'output_layer'"),
        # All that it names, the pattern before it names too.
        (dict(rank_pattern={"*": 8, "linear_qkv": 2}), "DoRA.rank_pattern: 'linear_qkv'"),
    ],
)
def test_a_pattern_that_decides_nothing_is_named(
    options: dict[str, Any], idle: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh_gpt()
    with pytest.raises(ValueError, match=f"{idle} decides for no adapted layer"):
        dora_fx.DoRA(GPT_TARGETS, **options)(model)
    assert not sites(model)
    with caplog.at_level(logging.WARNING):
        dora_fx.DoRA(GPT_TARGETS, allow_unmatched=True, **options)(model)
    assert idle in caplog.text


@every_case(
    ("options", "error"),
    [
        (dict(rank_pattern={"a": 0}), r"DoRA\.rank_pattern\['a'\]: found 0, expected a positive integer"),
        (dict(rank_pattern={"a": True}), r"DoRA\.rank_pattern\['a'\]: found True"),
        (dict(rank_pattern={"a": 2.0}), r"DoRA\.rank_pattern\['a'\]: found 2.0"),
        (dict(alpha_pattern={"a": "x"}), r"DoRA\.alpha_pattern\['a'\]: found 'x', expected a positive finite number"),
        (dict(alpha_pattern={"a": float("inf")}), r"DoRA\.alpha_pattern\['a'\]: found inf"),
        (dict(alpha_pattern=["a"]), r"DoRA\.alpha_pattern: found \['a'\], expected numbers by names"),
        (dict(rank_pattern={1: 2}), r"DoRA\.rank_pattern: found {1: 2}, expected numbers by names"),
        (dict(use_rslora="no"), "DoRA.use_rslora: found 'no', expected True or False"),
    ],
)
def test_what_is_no_pattern_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        dora_fx.DoRA(GPT_TARGETS, **options)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_computes_the_exported_adapter_and_it_comes_back(use_rslora: bool, tmp_path: Path) -> None:
    hf = tiny_hf_model()
    model = patterned(megatron_of(hf), use_rslora=use_rslora)
    expected = megatron_logits(model)
    dora_fx.export_hf(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"] is use_rslora
    assert_same_logits(hf_logits(load_with_peft(hf, tmp_path / "adapter")), expected, model)
    attached = dora_fx.import_hf(megatron_of(hf), tmp_path / "adapter")
    assert settings_of(attached) == settings_of(model)
    onto = dora_fx.import_hf(patterned(megatron_of(hf), use_rslora=use_rslora), tmp_path / "adapter")
    for found in (attached, onto):
        assert all(torch.equal(a, b) for a, b in zip(megatron_logits(found), expected, strict=True))
    with pytest.raises(ValueError, match=r"found dim 2 and alpha 8( with rsLoRA)? in the model, "):
        dora_fx.import_hf(patterned(megatron_of(hf), use_rslora=not use_rslora), tmp_path / "adapter")


def test_layers_with_and_without_rslora_are_one_peft_adapter(tmp_path: Path) -> None:
    hf = tiny_hf_model()
    model = megatron_of(hf)
    dora_fx.DoRA(["linear_qkv"], dim=3, alpha=5, use_rslora=True)(model)
    dora_fx.DoRA(["linear_fc2"], dim=3, alpha=5)(model)
    randomize_adapters(model)
    dora_fx.export_hf(model, tmp_path / "adapter")
    assert_same_logits(hf_logits(load_with_peft(hf, tmp_path / "adapter")), megatron_logits(model), model)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_checkpoint_has_them_all(use_rslora: bool, tmp_path: Path) -> None:
    model = patterned(fresh_gpt(), use_rslora=use_rslora)
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(model, path)
    for layer, adapter in read_adapters(path).items():
        own, site = adapter.settings, sites(model)[layer]
        expected = site.adapter.dim, site.adapter.alpha, site.scaling, use_rslora
        assert (own.dim, own.alpha, own.scaling, own.use_rslora) == expected
    other = patterned(fresh_gpt(), use_rslora=use_rslora)
    randomize_adapters(other, seed=9)
    dora_fx.load_checkpoint(other, path)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for options, found in (
        (dict(use_rslora=not use_rslora), f"use_rslora={use_rslora}, the model has use_rslora={not use_rslora}"),
        (dict(use_rslora=use_rslora, alpha_pattern={}), "alpha=(5|9.5), the model has alpha=8"),
        (dict(use_rslora=use_rslora, rank_pattern={"linear_proj": 2}), "dim=6, the model has dim=4"),
    ):
        with pytest.raises(dora_fx.CheckpointError, match=f"was trained with {found}"):
            dora_fx.load_checkpoint(patterned(fresh_gpt(), **options), path)


def test_a_manifest_names_rslora_where_it_is_used_alone_and_contradicts_nothing(tmp_path: Path) -> None:
    """Versions before rsLoRA load what has none, and refuse a field that they do not know."""
    for use_rslora in (False, True):
        path = tmp_path / str(use_rslora)
        dora_fx.save_checkpoint(patterned(fresh_gpt(), use_rslora=use_rslora), path)
        content = json.loads((path / MANIFEST).read_text())
        own = content["sites"].values()
        assert all(site.get("use_rslora", False) is use_rslora and len(site) == 4 + use_rslora for site in own)
    next(iter(own))["scaling"] *= 2
    del content["checksum"]
    (path / MANIFEST).write_text(json.dumps(content | {"checksum": _checksum(content)}))
    with pytest.raises(dora_fx.CheckpointError, match=r"scaling is .*, which dim and alpha do not make"):
        read_adapters(path)


def test_megatron_s_optimizer_keeps_the_ratios_with_its_scheduler_and_without() -> None:
    model = patterned(fresh_gpt())
    config = OptimizerConfig(optimizer="adam", lr=0.1, min_lr=0.01, weight_decay=0.5)
    optimizer = optimizer_of(model, config, loraplus_lr_ratio=8.0, magnitude_lr_ratio=0.5)
    kinds = {"linear_in.weight": (1.0, 0.5), "linear_out.weight": (8.0, 0.5), "weight_magnitude": (0.5, 0.0)}
    names = {id(parameter): name.partition(".adapter.")[2] for name, parameter in model.named_parameters()}
    for step in range(11):
        if step == 1:
            scheduler = OptimizerParamScheduler(optimizer, 0.0, 0.1, 0.01, 2, 10, "cosine", 0.5, 0.5, 0, "constant")
        if step >= 1:
            scheduler.step(1)
        own = {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}
        assert own.keys() == kinds.keys()
        base = own["linear_in.weight"]["lr"]
        for name, (ratio, decay) in kinds.items():
            assert own[name]["lr"] == pytest.approx(base * ratio) and own[name]["weight_decay"] == decay
    assert base == pytest.approx(0.01)


def test_a_checkpoint_keeps_the_groups_of_megatron_s_optimizer_apart(tmp_path: Path) -> None:
    """Megatron knows the groups of a checkpoint again by some of their fields."""
    config = OptimizerConfig(optimizer="adam", lr=0.1, weight_decay=0.5)
    groups = []
    for path in (None, tmp_path / "checkpoint"):
        model = patterned(fresh_gpt())
        optimizer = optimizer_of(model, config, loraplus_lr_ratio=8.0, magnitude_lr_ratio=8.0)
        if path is None:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * group["lr_mult"]
            dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer)
        else:
            dora_fx.load_checkpoint(model, path, optimizer)
        groups.append([(group["lr"], group["wd_mult"], len(group["params"])) for group in optimizer.param_groups])
    assert groups[0] == groups[1]
    assert sorted({lr for lr, *_ in groups[0]}) == pytest.approx([0.01, 0.08])


def test_a_config_without_a_learning_rate_has_nothing_to_multiply() -> None:
    with pytest.raises(ValueError, match=r"OptimizerConfig\.lr: found None"):
        dora_fx.config_overrides(OptimizerConfig(), loraplus_lr_ratio=2.0)
    with pytest.raises(ValueError, match="magnitude_lr_ratio: found nan"):
        dora_fx.config_overrides(OptimizerConfig(lr=1.0), magnitude_lr_ratio=float("nan"))
