"""Adapters between Megatron and Hugging Face PEFT: the same logits both ways, the same bits there and back."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dora_fx
from tests.closeness import assert_apart
from tests.hf_models import tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters, sites, tiny_gpt
from tests.peft_models import (
    HF_TARGETS,
    adapted_megatron,
    assert_same_logits,
    hf_logits,
    hf_targets,
    load_with_peft,
    megatron_logits,
    megatron_of,
    save_peft_adapter,
)
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

KINDS = ["llama", "llama_wide_heads", "llama_one_group", "qwen2", "qwen3", "phi3"]


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters() if ".adapter." in name}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


LOOKED_THROUGH = ("chunks_of", "unwrap", "walk")
NAMED = ("check_settings", "known_architecture_maybe")


def test_a_model_is_looked_through_and_named_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whichever file of the room asks."""
    hf = tiny_hf_model()
    model, another = adapted_megatron(hf), megatron_of(hf)
    dora_fx.export_hf(model, tmp_path / "adapter")
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for path, module in list(sys.modules.items()):
        for name in (*LOOKED_THROUGH, *NAMED):
            if path.startswith("dora_fx.hf.") and hasattr(module, name):
                monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    ways: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
        "export_hf": (lambda: dora_fx.export_hf(model, tmp_path / "again"), NAMED),
        "iter_adapter": (lambda: list(dora_fx.iter_adapter(model)), NAMED),
        "iter_merged": (lambda: list(dora_fx.iter_merged(model)), NAMED),
        "import_hf": (lambda: dora_fx.import_hf(another, tmp_path / "adapter"), NAMED),
        "compare_merged": (lambda: dora_fx.compare_merged(model, log_probs=lambda: None), ()),
    }
    for way, (call, named) in ways.items():
        counts.clear()
        call()
        assert counts == dict.fromkeys((*LOOKED_THROUGH, *named), 1), way


# From Megatron to PEFT


@every_case("kind", KINDS)
def test_peft_computes_the_logits_of_the_exported_adapter(kind: str, tmp_path: Path) -> None:
    hf = tiny_hf_model(kind)
    model = adapted_megatron(hf)
    dora_fx.export_hf(model, tmp_path / "adapter", base_model="some/base")
    expected = megatron_logits(model)
    assert_apart(expected, hf_logits(hf))
    assert_same_logits(hf_logits(load_with_peft(hf, tmp_path / "adapter")), expected, model)
    config = config_of(tmp_path / "adapter")
    assert config["target_modules"] == hf_targets(hf)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.05)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")


def test_an_untied_output_layer_is_exported(tmp_path: Path) -> None:
    hf = tiny_hf_model()
    model = adapted_megatron(hf, ["linear_proj", "output_layer"])
    dora_fx.export_hf(model, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["target_modules"] == ["lm_head", "o_proj"]
    peft_model = load_with_peft(hf, tmp_path / "adapter")
    assert_same_logits(hf_logits(peft_model), megatron_logits(model), model)


def test_a_tied_output_layer_is_exported_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT computes with it, and warns by itself; merged there, it would change the embedding too."""
    hf = tiny_hf_model("llama_tied")
    model = adapted_megatron(hf, ["linear_proj", "output_layer"])
    dora_fx.export_hf(model, tmp_path / "adapter")
    assert "lm_head is adapted and tied to the embedding" in caplog.text
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        peft_model = peft.PeftModel.from_pretrained(copy.deepcopy(hf), str(tmp_path / "adapter"))
    expected = megatron_logits(model)
    assert_apart(expected, hf_logits(hf))
    assert_same_logits(hf_logits(peft_model), expected, model)
    imported = dora_fx.import_hf(megatron_of(hf), tmp_path / "adapter")
    torch.testing.assert_close(megatron_logits(imported), expected, atol=0, rtol=0)
    embedding = hf.get_input_embeddings().weight
    assert not torch.equal(peft_model.merge_and_unload().get_input_embeddings().weight, embedding)
    caplog.clear()
    dora_fx.export_hf(adapted_megatron(hf, ["linear_proj"]), tmp_path / "another")
    assert "tied" not in caplog.text


def test_layers_that_differ_in_rank_and_target(tmp_path: Path) -> None:
    hf = tiny_hf_model()
    model = dora_fx.DoRA(["*.layers.0.*linear_qkv", "linear_fc2"], dim=4, alpha=12)(megatron_of(hf))
    dora_fx.DoRA(["*.layers.1.*linear_proj"], dim=6, alpha=9.5)(model)
    randomize_adapters(model)
    dora_fx.export_hf(model, tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["target_modules"] == [
        "down_proj",
        *(f"model.layers.0.self_attn.{part}_proj" for part in "kqv"),
        "model.layers.1.self_attn.o_proj",
    ]
    assert (config["r"], config["rank_pattern"]) == (4, {"o_proj": 6})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (12, {"o_proj": 9.5})
    peft_model = load_with_peft(hf, tmp_path / "adapter")
    assert_same_logits(hf_logits(peft_model), megatron_logits(model), model)
    back = dora_fx.import_hf(megatron_of(hf), tmp_path / "adapter")
    assert_same(adapter_tensors(back), adapter_tensors(model))


@every_case("dtype", [torch.float32, torch.bfloat16])
@every_case("kind", ["llama", "qwen2", "phi3"])
def test_there_and_back_is_bitwise(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = tiny_hf_model(kind)
    model = adapted_megatron(hf, dtype=dtype)
    dora_fx.export_hf(model, tmp_path / "adapter")
    dtypes = {name.rpartition("lora_")[2]: t.dtype for name, t in stored(tmp_path / "adapter").items()}
    assert dtypes == {"A.weight": dtype, "B.weight": dtype, "magnitude_vector": torch.float32}
    for target in (megatron_of(hf, dtype=dtype), adapted_megatron(hf, dtype=dtype)):
        assert dora_fx.import_hf(target, tmp_path / "adapter") is target
        assert_same(adapter_tensors(target), adapter_tensors(model))
        assert torch.equal(megatron_logits(target), megatron_logits(model))
        assert all(parameter.requires_grad == (".adapter." in name) for name, parameter in target.named_parameters())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_padded_query_groups_are_cut_off_and_put_back(kind: str, tmp_path: Path) -> None:
    hf = tiny_hf_model(kind)
    plain, padded = adapted_megatron(hf), megatron_of(hf, num_query_groups=4)
    dora_fx.export_hf(plain, tmp_path / "plain")
    dora_fx.import_hf(padded, tmp_path / "plain")
    assert_same_logits(megatron_logits(padded), megatron_logits(plain), padded)
    dora_fx.export_hf(padded, tmp_path / "padded")
    assert_same(stored(tmp_path / "padded"), stored(tmp_path / "plain"))
    assert config_of(tmp_path / "padded") == config_of(tmp_path / "plain")


def test_a_model_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    model = adapted_megatron(tiny_hf_model(), ["linear_proj"])
    with pytest.raises(ValueError, match=r"model_type: found 'gpt2', expected one of llama, mistral"):
        dora_fx.export_hf(model, tmp_path / "adapter", model_type="gpt2")
    assert not (tmp_path / "adapter").exists()


# From PEFT to Megatron

SETTINGS: dict[str, dict[str, Any]] = {
    "own_a_for_every_layer": {},
    "some_targets": dict(target_modules=["q_proj", "v_proj", "up_proj"]),
    "rank_pattern": dict(
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 8, "down_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 24, "down_proj": 5},
    ),
    "scalings_a_power_of_two_apart": dict(rank_pattern={"k_proj": 8, "up_proj": 2}),
    "rslora": dict(use_rslora=True),
    "regex_targets": dict(target_modules=r".*\.layers\.1\..*(gate|o)_proj"),
    "some_layers": dict(layers_to_transform=[1]),
    "lm_head": dict(target_modules=["k_proj", "lm_head"]),
    "fused": dict(
        target_modules=["qkv_proj", "gate_up_proj"],
        rank_pattern={"layers.1.self_attn.qkv_proj": 8},
        alpha_pattern={"gate_up_proj": 5},
    ),
}
SETTINGS_OF_KINDS = [
    *((settings, kind) for settings in SETTINGS if settings != "fused" for kind in ("llama", "qwen2")),
    *((settings, "phi3") for settings in ("own_a_for_every_layer", "rslora", "fused")),
]


@every_case(("settings", "kind"), SETTINGS_OF_KINDS)
def test_megatron_computes_the_logits_of_a_peft_adapter(settings: str, kind: str, tmp_path: Path) -> None:
    hf = tiny_hf_model(kind)
    peft_model = save_peft_adapter(hf, tmp_path / "adapter", **SETTINGS[settings])
    model = dora_fx.import_hf(megatron_of(hf), tmp_path / "adapter")
    expected = hf_logits(peft_model)
    assert_apart(expected, hf_logits(hf))
    assert_same_logits(megatron_logits(model), expected, model)
    # And once more through our own export, whose ranks are the stacked ones.
    dora_fx.export_hf(model, tmp_path / "again")
    assert_same_logits(hf_logits(load_with_peft(hf, tmp_path / "again")), expected, model)


def test_separate_factors_are_stacked_and_rows_without_an_adapter_are_the_base(tmp_path: Path) -> None:
    hf = tiny_hf_model()
    save_peft_adapter(hf, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], lora_dropout=0.25)
    model = dora_fx.import_hf(megatron_of(hf), tmp_path / "adapter", training=False)
    assert len(sites(model)) == 2 and not model.training
    site = model.decoder.layers[1].self_attention.linear_qkv
    tensors = stored(tmp_path / "adapter")
    prefix = "base_model.model.model.layers.1.self_attn."
    assert (site.adapter.dim, site.scaling, site.adapter.dropout) == (8, 3.0, 0.25)
    lora_a = torch.cat([tensors[f"{prefix}{part}_proj.lora_A.weight"] for part in "qv"])
    assert torch.equal(site.adapter.linear_in.weight, lora_a)
    # Two groups of three queries, a key and a value of eight rows each.
    rows = torch.arange(80).view(2, 5, 8)
    key, value = rows[:, 3].flatten(), rows[:, 4].flatten()
    lora_b = site.adapter.linear_out.weight
    assert torch.equal(lora_b[value, 4:], tensors[f"{prefix}v_proj.lora_B.weight"])
    assert lora_b[value, :4].abs().max() == lora_b[key].abs().max() == 0.0
    assert torch.equal(site.adapter.weight_magnitude[key], site._get_weight_norm()[key])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_rows_of_a_fused_layer_are_in_the_order_of_each_side(tmp_path: Path) -> None:
    hf = tiny_hf_model("phi3")
    model = adapted_megatron(hf, ["linear_qkv"])
    adapter = model.decoder.layers[1].self_attention.linear_qkv.adapter
    dora_fx.export_hf(model, tmp_path / "adapter")
    prefix = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
    exported = stored(tmp_path / "adapter")[f"{prefix}magnitude_vector"]
    # Two groups of three queries, a key and a value of eight rows each.
    rows = adapter.weight_magnitude.detach().view(2, 5, 8)
    assert torch.equal(exported, torch.cat([rows[:, :3].flatten(), rows[:, 3].flatten(), rows[:, 4].flatten()]))
    assert torch.equal(stored(tmp_path / "adapter")[f"{prefix}A.weight"], adapter.linear_in.weight)


def test_an_adapter_of_other_names_than_the_models_is_refused(tmp_path: Path) -> None:
    llama, phi3 = tiny_hf_model(), tiny_hf_model("phi3")
    adapted = adapted_megatron(phi3)
    for stated in ("llama", "qwen3"):
        with pytest.raises(ValueError, match=f"model_type: found '{stated}', expected 'phi3', which the model was"):
            dora_fx.export_hf(adapted, tmp_path / "adapter", model_type=stated)
    llama.config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base: found model_type 'llama' in config.json, .* as phi3 does; pass"):
        dora_fx.export_hf(adapted, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert not (tmp_path / "adapter").exists()
    save_peft_adapter(llama, tmp_path / "of llama")
    refuse(tmp_path / "of llama", "found an adapter of .*expected layers such as .*qkv_proj", kind="phi3")
    save_peft_adapter(phi3, tmp_path / "of phi3")
    refuse(tmp_path / "of phi3", "found an adapter of .*expected layers such as .*q_proj")


def test_a_model_that_was_made_elsewhere_is_named_as_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A list of chunks that hold no note of an architecture, as of any other program."""
    hf = tiny_hf_model("phi3")
    dora_fx.export_hf(adapted_megatron(hf), tmp_path / "noted")
    model, empty = adapted_megatron(hf), megatron_of(hf)
    del model.hf_model_type, empty.hf_model_type
    phi3 = dict(base_model=str(tmp_path / "base"), model_type="phi3")
    hf.config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"found model_type 'phi3' .* as llama does; pass model_type='phi3'"):
        dora_fx.export_hf([model], tmp_path / "stated", base_model=phi3["base_model"])
    dora_fx.export_hf([model], tmp_path / "stated", **phi3)
    assert_same(stored(tmp_path / "stated"), stored(tmp_path / "noted"))
    assert "does not say" not in caplog.text
    dora_fx.export_hf([model], tmp_path / "assumed", base_model="a/name")
    assert "does not say what architecture it is of: its layers were named as those of llama" in caplog.text
    # Names in the files say what they are of.
    dora_fx.import_hf([empty], tmp_path / "stated")
    assert_same(adapter_tensors(empty), adapter_tensors(model))


def test_an_adapted_model_takes_only_what_fits_it(tmp_path: Path) -> None:
    hf = tiny_hf_model()
    save_peft_adapter(hf, tmp_path / "separate")
    dora_fx.export_hf(adapted_megatron(hf, ["linear_qkv"]), tmp_path / "qkv")
    model = adapted_megatron(hf)
    before = adapter_tensors(model)
    for folder, message in (
        ("separate", r"linear_qkv: found dim 4 and alpha 12 in the model, expected dim 12 and alpha 36"),
        ("qkv", r"linear_proj: found adapter in the model, expected no adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            dora_fx.import_hf(model, tmp_path / folder)
    with pytest.raises(ValueError, match=r"linear_proj: found no adapter in the model, expected adapter as in"):
        dora_fx.export_hf(model, tmp_path / "all")
        dora_fx.import_hf(adapted_megatron(hf, ["linear_qkv"]), tmp_path / "all")
    assert_same(adapter_tensors(model), before)


# What is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that can be imported, until a test damages it."""
    save_peft_adapter(tiny_hf_model(), tmp_path / "adapter")
    change_config(tmp_path / "adapter", base_model_name_or_path="some/base")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def refuse(folder: Path, message: str, kind: str = "llama", **settings: Any) -> None:
    model = megatron_of(tiny_hf_model(kind, **settings.pop("overrides", {})))
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        dora_fx.import_hf(model, folder, **settings)
    assert set(model.state_dict()) == names


@every_case(
    ("changes", "message"),
    [
        (dict(use_dora=False), "adapter_config.json: use_dora is False, which is not supported; expected True"),
        (dict(peft_type="LOHA"), "peft_type is 'LOHA'"),
        (dict(bias="all"), "bias is 'all', which is not supported; expected 'none'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\], .* expected it unset"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (dict(use_qalora=True), "use_qalora is True"),
        (dict(an_option_of_the_future=3), "an_option_of_the_future is 3"),
        (dict(r=5), r"_proj has A of shape \(4, 80\).*expected the rank 5 that adapter_config.json states"),
        (dict(r=0), "r or rank_pattern has 0, expected a positive number"),
        (dict(r=-4), "r or rank_pattern has -4, expected a positive number"),
        (dict(r=True), "r or rank_pattern has True, expected a positive number"),
        (dict(rank_pattern={"q_proj": 4.5}), r"r or rank_pattern has 4\.5, expected a positive number"),
        (dict(lora_alpha="12"), "lora_alpha or alpha_pattern has '12', expected a positive number"),
        (dict(alpha_pattern={"q_proj": -1.0}), r"lora_alpha or alpha_pattern has -1\.0, expected a positive number"),
        (dict(alpha_pattern={"q_proj": 9}), r"q_proj|k_proj.* expected a power of two"),
        (dict(target_modules=[*HF_TARGETS, "lm_head"]), "target_modules names lm_head, which has no tensors"),
        (dict(target_modules="(q_proj"), r"target_modules has '\(q_proj', expected a regular expression"),
        (dict(target_modules={"q_proj": 1}), "target_modules is {'q_proj': 1}, expected a list of names"),
        (dict(target_modules=[1]), r"target_modules is \[1\], expected a list of names"),
        (dict(rank_pattern={"q_proj": 4, "*_proj": 4}), r"rank_pattern has '\*_proj', expected a regular expression"),
        # An expression by itself, but not inside PEFT's.
        (dict(rank_pattern={"(?i)Q_PROJ": 4}), r"rank_pattern has '\(\?i\)Q_PROJ', expected a regular expression"),
        (dict(alpha_pattern={"[": 4}), r"alpha_pattern has '\[', expected a regular expression"),
        (dict(alpha_pattern=["q_proj"]), r"alpha_pattern is \['q_proj'\], expected an object"),
    ],
)
def test_options_are_refused_by_name(changes: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **changes)
    refuse(folder, message)


Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj."


def test_tensors_are_refused_by_name(folder: Path) -> None:
    good = stored(folder)

    def refuse_tensors(message: str, **changes: torch.Tensor | None) -> None:
        tensors = {name: value for name, value in (good | changes).items() if value is not None}
        save_file(tensors, folder / "adapter_model.safetensors")
        refuse(folder, message)

    magnitude, lora_b = f"{Q_PROJ}lora_magnitude_vector", f"{Q_PROJ}lora_B.weight"
    refuse_tensors(r"layers.1.self_attn.q_proj has lora_a, lora_b and no lora_magnitude_vector", **{magnitude: None})
    refuse_tensors(r"q_proj: found magnitude \(47,\), expected \(48,\)", **{magnitude: good[magnitude][:-1].clone()})
    refuse_tensors(r"q_proj: lora_b: found NaN or inf", **{lora_b: good[lora_b] / 0.0})
    refuse_tensors(r"found a tensor 'lm_head.weight', expected names", **{"lm_head.weight": torch.ones(2)})
    copy = {"base_model.model.lm_head.base_layer.weight": torch.ones(64, 48)}
    refuse_tensors(r"found a copy of a base weight, .*lm_head.* save_embedding_layers=False", **copy)
    strange = {
        name.replace("q_proj", "x_proj"): value.clone() for name, value in good.items() if name.startswith(Q_PROJ)
    }
    refuse_tensors(r"found an adapter of model.layers.1.self_attn.x_proj \(1 without a place in the model\)", **strange)
    missing: dict[str, None] = {name: None for name in good if name.startswith(Q_PROJ)}
    refuse_tensors(r"target_modules names model.layers.1.self_attn.q_proj, which has no tensors", **missing)


def test_files_and_bases_are_named(folder: Path, tmp_path: Path) -> None:
    refuse(folder, r"the adapter is of the base 'some/base', expected 'other/base'", base_model="other/base")
    refuse(folder, r"o_proj: found lora_a \(4, 48\), expected \(4, 96\)", overrides=dict(hidden_size=96))
    refuse(folder, r"layers.1.* \(7 without a place in the model\)", overrides=dict(num_hidden_layers=1))
    truncated = shutil.copytree(folder, tmp_path / "truncated")
    data = (folder / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(data[:-10])
    refuse(truncated, "adapter_model.safetensors: cannot be read")
    (truncated / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(truncated, "adapter_model.safetensors: found a Git LFS pointer in place of the file; run: git lfs pull")
    for text in ("{", "[" * 100_000):
        (truncated / "adapter_config.json").write_text(text)
        refuse(truncated, "adapter_config.json: cannot be read")
    refuse(tmp_path / "nowhere", r"nowhere/adapter_config.json: no such file, expected a PEFT adapter")


def test_exports_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    hf = tiny_hf_model()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match=r"taken: it exists, expected a name that is free or an empty folder"):
        dora_fx.export_hf(adapted_megatron(hf), tmp_path / "taken")
    with pytest.raises(ValueError, match="found no adapted layer"):
        dora_fx.export_hf(megatron_of(hf), tmp_path / "new")
    plain = dora_fx.DoRA(GPT_TARGETS, dim=4)(tiny_gpt(gated_linear_unit=False))
    with pytest.raises(ValueError, match="the model's config has gated_linear_unit = False, expected True"):
        dora_fx.export_hf(plain, tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/below: "):
        dora_fx.export_hf(adapted_megatron(hf), tmp_path / "file" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
