"""PEFT files that lost a layer, or whose numbers no model holds: one error by name, and nothing is attached."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor

import dora_fx
from dora_fx.hf.peft_patterns import is_target
from tests.hf_models import tiny_hf_model
from tests.peft_models import assert_same_logits, hf_logits, megatron_logits, megatron_of, save_peft_adapter
from tests.tables import every_case

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
PREFIX = "base_model.model.model."
DOWN = f"{PREFIX}layers.1.mlp.down_proj."
A, B, M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
Tensors = dict[str, Tensor]

# Settings of PEFT that leave out layers of the targets' names, and a layer that each keeps.
PARTIAL: dict[str, tuple[dict[str, Any], str]] = {
    "layer": (dict(layers_to_transform=1), "layers.1.mlp.down_proj"),
    "layers": (dict(layers_to_transform=[0, 1]), "layers.0.self_attn.k_proj"),
    "no_layers": (dict(layers_to_transform=[]), "layers.0.self_attn.k_proj"),
    "pattern": (dict(layers_to_transform=[1], layers_pattern="layers"), "layers.1.self_attn.q_proj"),
    "patterns": (dict(layers_to_transform=[0], layers_pattern=["h", "layers"]), "layers.0.mlp.down_proj"),
    "excluded": (dict(exclude_modules=["k_proj", "layers.0.mlp.down_proj"]), "layers.1.mlp.down_proj"),
    "expression": (dict(exclude_modules=r".*\.0\..*"), "layers.1.self_attn.v_proj"),
    "both": (dict(exclude_modules=["v_proj"], layers_to_transform=[1]), "layers.1.self_attn.q_proj"),
}


@pytest.fixture
def world_and_folder(world: None, tmp_path: Path) -> Iterator[Path]:
    """An adapter that can be imported, until a test damages it."""
    save_peft_adapter(tiny_hf_model(), tmp_path / "adapter", target_modules=TARGETS)
    yield tmp_path / "adapter"


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in edit(load_file(file)).items()}, file)


def refuse(folder: Path, message: str, model: Any = None) -> None:
    model = megatron_of(tiny_hf_model()) if model is None else model
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        dora_fx.import_hf(model, folder)
    assert "\n" not in str(raised.value)
    assert {name: value is None or value.data_ptr() for name, value in model.state_dict().items()} == {
        name: value is None or value.data_ptr() for name, value in before.items()
    }


@every_case("name", PARTIAL)
def test_a_lost_layer_is_found_whatever_leaves_out_others(name: str, world: None, tmp_path: Path) -> None:
    """As many layers as PEFT adapts are imported, and one less is an error."""
    settings, layer = PARTIAL[name]
    hf = tiny_hf_model()
    expected = save_peft_adapter(hf, tmp_path, target_modules=TARGETS, **settings)
    model = dora_fx.import_hf(megatron_of(hf), tmp_path)
    assert_same_logits(megatron_logits(model), hf_logits(expected), expected)
    edit_tensors(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if f".{layer}." not in key})
    refuse(tmp_path, rf"target_modules names model\.{layer}, which has no tensors \(1 such layers\)")
    with pytest.raises(ValueError, match=f"names model.{layer}, which has no tensors"):
        dora_fx.import_hf(tiny_hf_model(), tmp_path)


def test_the_layers_of_a_config_are_those_that_peft_adapts() -> None:
    paths = [f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.down_proj")]
    paths += ["lm_head", "model.h.1.layers.0.q_proj", "q_proj", "layers.1.q_proj"]
    targets = (["q_proj", "down_proj"], ["model.layers.0.mlp.down_proj", "q_proj"], r".*\.1\..*")
    for settings in ({}, *(settings for settings, _ in PARTIAL.values()), dict(layers_to_transform=[11])):
        for target in targets:
            if isinstance(target, str) and "layers_to_transform" in settings:
                continue
            config = peft.LoraConfig(target_modules=target, use_dora=True, **settings)
            saved = json.loads(json.dumps(config.to_dict(), default=sorted))
            expected = [bool(check_target_module_exists(config, path)) for path in paths]
            excluded = [type(check_target_module_exists(config, path)).__name__ == "_ExcludedModule" for path in paths]
            wanted = [found and not out for found, out in zip(expected, excluded, strict=True)]
            assert [is_target(saved, path) for path in paths] == wanted, (settings, target)


def with_dtype(key: str, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: tensors[key].to(dtype)}


def renamed(tensors: Tensors, part: str, other: str) -> Tensors:
    """Copies of the tensors that have a part in their names, with another in its place."""
    return {key.replace(part, other): value.clone() for key, value in tensors.items() if part in key}


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "float8_a": (with_dtype(DOWN + A, torch.float8_e4m3fn), "down_proj.lora_A.weight has the dtype F8_E4M3, expected"),
    "float8_b": (
        with_dtype(DOWN + B, torch.float8_e5m2),
        "down_proj.lora_B.weight has the dtype F8_E5M2, expected one",
    ),
    "float8_m": (with_dtype(DOWN + M, torch.float8_e4m3fn), "lora_magnitude_vector has the dtype F8_E4M3"),
    "int8": (with_dtype(DOWN + B, torch.int8), "lora_B.weight has the dtype I8, expected one of F64, F32, F16, BF16"),
    "int64": (with_dtype(DOWN + M, torch.int64), "lora_magnitude_vector has the dtype I64"),
    "bool": (with_dtype(DOWN + A, torch.bool), "lora_A.weight has the dtype BOOL"),
    "complex": (with_dtype(DOWN + A, torch.complex64), "lora_A.weight has the dtype C64"),
    "two_magnitudes": (
        lambda tensors: tensors | {f"{DOWN}{M}.weight": 2 * tensors[DOWN + M]},
        rf"found {DOWN}{M}(\.weight)? and {DOWN}{M}(\.weight)?, expected one of them",
    ),
    "other_ranks": (
        lambda tensors: tensors | {DOWN + B: tensors[DOWN + B][:, :3]},
        r"down_proj has A of shape \(4, 80\) and B of shape \(48, 3\), expected the rank 4",
    ),
    "two_prefixes": (
        lambda tensors: tensors | renamed(tensors, PREFIX, f"{PREFIX}model."),
        r"found an adapter of model\.model\.layers\.0.* \(8 without a place in the model\)",
    ),
    "not_a_target": (
        lambda tensors: tensors | renamed(tensors, "1.self_attn.q_proj", "1.self_attn.o_proj"),
        r"found tensors of model\.layers\.1\.self_attn\.o_proj \(1 such layers\), which target_modules, .* leave out",
    ),
    "too_large": (
        lambda tensors: tensors | {DOWN + B: tensors[DOWN + B].double() * 1e300},
        r"down_proj: lora_b has values up to .*e\+29\d, which the model's torch.float32 does not hold",
    ),
    "product": (
        lambda tensors: tensors | {DOWN + B: tensors[DOWN + B] * 1e25},
        r"times B A may be as large as .*e\+2\d, expected less than .*, of which torch.float32 holds the norm",
    ),
    "magnitude": (
        lambda tensors: tensors | {DOWN + M: tensors[DOWN + M].double() * 1e300},
        "magnitude has values up to .*, which the model's torch.float32 does not hold",
    ),
}


@every_case("name", TENSORS)
def test_doubtful_tensors_are_refused_by_their_keys(name: str, world_and_folder: Path) -> None:
    edit, message = TENSORS[name]
    edit_tensors(world_and_folder, edit)
    refuse(world_and_folder, message)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha_huge": (
        dict(lora_alpha=1e308),
        r"lora_alpha 1e\+308 gives a scaling of 2.5e\+307, expected one",
    ),
    "alpha_vanishes": (dict(lora_alpha=1e-300), "lora_alpha 1e-300 gives a scaling of 2.5e-301, expected one that"),
    "alpha_inf": (dict(lora_alpha=float("inf")), "lora_alpha or alpha_pattern has inf, expected a positive number"),
    "alpha_nan": (dict(lora_alpha=float("nan")), "lora_alpha or alpha_pattern has nan, expected a positive number"),
    "alpha_zero": (dict(lora_alpha=0), "lora_alpha or alpha_pattern has 0, expected a positive number"),
    "alpha_negative": (dict(lora_alpha=-16), "lora_alpha or alpha_pattern has -16, expected a positive number"),
    "alpha_digits": (dict(lora_alpha=10**400), "lora_alpha or alpha_pattern has 1000"),
    "alpha_of_one": (dict(alpha_pattern={"down_proj": 1e40}), r"down_proj: lora_alpha 1e\+40 gives a scaling"),
    "alphas_apart": (dict(alpha_pattern={"k_proj": 12 * 2.0**-130}), "k_proj: lora_alpha .* gives a scaling of"),
    "b_vanishes": (dict(lora_alpha=2e38, alpha_pattern={"k_proj": 2e38 * 2.0**-240}), "times B A may be as large"),
    "rank_zero": (dict(r=0), "r or rank_pattern has 0, expected a positive number"),
    "rslora": (dict(use_rslora="false"), "use_rslora is 'false', expected true or false"),
    "dropout": (dict(lora_dropout=1.5), "lora_dropout is 1.5, expected a probability below 1"),
    "dropout_text": (dict(lora_dropout="0.1"), "lora_dropout is '0.1', expected a probability below 1"),
    "layers": (dict(layers_to_transform="1"), "layers_to_transform is '1', expected a number of a layer or a list"),
    "layers_float": (dict(layers_to_transform=[1.0]), r"layers_to_transform is \[1.0\], expected a number of a layer"),
    "pattern_alone": (dict(layers_pattern="layers"), "layers_pattern is set and layers_to_transform is not"),
    "pattern": (
        dict(layers_to_transform=[0], layers_pattern=["("]),
        r"layers_pattern has '\(', expected a regular exp",
    ),
    "layers_and_expression": (
        dict(target_modules=r".*\.(q|k|v|down)_proj", layers_to_transform=[0]),
        r"layers_to_transform is \[0\] beside target_modules as an expression, which PEFT refuses",
    ),
    "excluded": (dict(exclude_modules={"k_proj": 1}), "exclude_modules is {'k_proj': 1}, expected a list of names"),
    "excluded_expression": (dict(exclude_modules="*"), r"exclude_modules has '\*', expected a regular expression"),
    "too_few": (dict(exclude_modules=["k_proj"]), r"found tensors of model\.layers\.0\.self_attn\.k_proj \(2 such"),
}


@every_case("name", CONFIGS)
def test_doubtful_options_are_refused_by_name(name: str, world_and_folder: Path) -> None:
    changes, message = CONFIGS[name]
    file = world_and_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refuse(world_and_folder, message)


def test_values_are_those_that_the_model_s_dtype_holds(world_and_folder: Path) -> None:
    """What float32 holds and float16 does not; and parts of one layer in several dtypes lose nothing."""
    key = f"{PREFIX}layers.0.self_attn.k_proj."
    edit_tensors(world_and_folder, lambda tensors: tensors | {DOWN + A: tensors[DOWN + A] * 1e6})
    model = megatron_of(tiny_hf_model()).half()
    refuse(world_and_folder, "down_proj: lora_a has values up to .*, which the model's torch.float16 does not", model)
    edit_tensors(world_and_folder, lambda tensors: tensors | {DOWN + A: tensors[DOWN + A] * 1e-6})
    q = f"{PREFIX}layers.0.self_attn.q_proj."
    edit_tensors(
        world_and_folder, lambda tensors: tensors | {q + name: tensors[q + name].bfloat16() for name in (A, B)}
    )
    imported = dora_fx.import_hf(megatron_of(tiny_hf_model()), world_and_folder)
    stored = load_file(world_and_folder / "adapter_model.safetensors")[key + A]
    assert stored.dtype is torch.float32
    assert torch.equal(imported.decoder.layers[0].self_attention.linear_qkv.adapter.linear_in.weight[4:8], stored)


def test_patterns_that_name_nothing_are_said(world_and_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = world_and_folder / "adapter_config.json"
    patterns = {"rank_pattern": {"up_proj": 9}, "alpha_pattern": {"down_proj": 3, "gone": 1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | patterns))
    with caplog.at_level(logging.WARNING):
        dora_fx.import_hf(megatron_of(tiny_hf_model()), world_and_folder)
    assert "rank_pattern 'up_proj' and alpha_pattern 'gone' names no layer that has tensors" in caplog.text
