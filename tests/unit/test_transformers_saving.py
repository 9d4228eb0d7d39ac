"""What transformers saves of an adapted model has the adapter, and Trainer goes on with it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import dora_fx
from tests.closeness import assert_apart
from tests.hf_models import save_tiny_checkpoint
from tests.models import randomize_adapters
from tests.peft_models import adapters, assert_equal, assert_same_logits, hf_logits, load_with_peft


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "base")


def of_folder(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def adapted_of(folder: Path) -> Any:
    model = dora_fx.DoRA("all-linear", dim=4, alpha=12)(of_folder(folder))
    randomize_adapters(model)
    return model


def test_what_save_pretrained_saves_has_the_adapter(base_folder: Path, tmp_path: Path) -> None:
    model = adapted_of(base_folder)
    copied = copy.deepcopy(model)
    randomize_adapters(copied, 7)
    assert_apart(hf_logits(copied), hf_logits(model))
    for name, saved in {"first": model, "copy": copied, "compiled": torch.compile(model, backend="eager")}.items():
        saved.save_pretrained(tmp_path / name)
        expected = hf_logits(getattr(saved, "_orig_mod", saved))
        for loaded in (
            of_folder(tmp_path / name),
            load_with_peft(of_folder(base_folder), tmp_path / name),
            dora_fx.import_hf(of_folder(base_folder), tmp_path / name),
        ):
            assert_same_logits(hf_logits(loaded), expected, model)
    # With a config beside it, the adapter would pass for a model where PEFT is not installed.
    assert not (tmp_path / "first" / "config.json").exists()


@pytest.mark.parametrize("home", ["dora_fx", "dora_fx.attach.config"])
def test_a_program_that_uses_nothing_but_dora_saves_the_adapter(home: str, base_folder: Path, tmp_path: Path) -> None:
    """Names of the package are imported where they are used, and saving belongs to another room than attaching."""
    code = (
        f"import sys, transformers\nfrom {home} import DoRA\nassert 'dora_fx.hf' not in sys.modules\n"
        f"model = DoRA('all-linear', dim=4)(transformers.AutoModelForCausalLM.from_pretrained({str(base_folder)!r}))\n"
        f"model.save_pretrained({str(tmp_path / 'saved')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "saved" / "config.json").exists()
    assert len(adapters(dora_fx.import_hf(of_folder(base_folder), tmp_path / "saved"))) > 0


def test_a_hub_gets_what_save_pretrained_saves(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub stays out of it: the folder that transformers would upload is kept in its place."""
    model, kept = adapted_of(base_folder), tmp_path / "uploaded"

    class Hub:
        def create_repo(self, repo_id: str, **settings: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *args, **settings: type("Card", (), {"save": lambda self, path: None})(),
    )
    model._upload_modified_files = lambda folder, *args, **settings: shutil.copytree(folder, kept)
    model.push_to_hub("name")
    assert_same_logits(hf_logits(of_folder(kept)), hf_logits(model), model)


def test_a_merged_model_is_saved_whole(base_folder: Path, tmp_path: Path) -> None:
    model = adapted_of(base_folder)
    expected = hf_logits(model)
    model.save_pretrained(tmp_path / "stream", state_dict=dict(dora_fx.iter_merged(model)))
    with dora_fx.merged(model):
        model.save_pretrained(tmp_path / "within")
    dora_fx.merge(model).save_pretrained(tmp_path / "merged")
    for name in ("stream", "within", "merged"):
        assert_same_logits(hf_logits(of_folder(tmp_path / name)), expected, model)


def test_what_an_adapter_cannot_be_saved_as_is_refused(base_folder: Path, tmp_path: Path) -> None:
    model = adapted_of(base_folder)
    for settings in (dict(push_to_hub=True), dict(variant="fp16"), dict(save_peft_format=False)):
        with pytest.raises(ValueError, match=rf"found {next(iter(settings))}=.*dora_fx.export_hf .*dora_fx.merged"):
            model.save_pretrained(tmp_path / "out", **settings)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"found another model.layers.0.self_attn.q_proj.adapter\S+ in state_dict"):
        model.save_pretrained(tmp_path / "out", state_dict=other)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())


@pytest.mark.parametrize("best", [False, True])
def test_trainer_goes_on_from_its_checkpoint(best: bool, base_folder: Path, tmp_path: Path) -> None:
    data = [dict(input_ids=tokens, labels=tokens) for tokens in torch.randint(0, 64, (16, 12))]

    def trained(folder: Path, resume: Path | None = None, **settings: Any) -> Any:
        model = dora_fx.DoRA("all-linear", dim=4, alpha=12)(of_folder(base_folder))
        if not best:
            for layer in model.model.layers:
                layer.compile(backend="dora_fx", options={"inner_compiler": "eager"})
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4]).train(
            resume_from_checkpoint=None if resume is None else str(resume)
        )
        return model

    if best:
        # The loss falls, and the checkpoint with the larger one is asked for, so that it is not the last.
        settings = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
        model = trained(tmp_path / "run", **settings, eval_strategy="steps", eval_steps=2)
        first, last = (load_file(tmp_path / "run" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4))
        assert_equal(adapters(model), first)
        assert any(not torch.equal(first[name], last[name]) for name in first)
        return
    counters.clear()
    whole = trained(tmp_path / "whole")
    assert counters["dora_fx"]["sites_rewritten"] >= 7 and counters["dora_fx"]["sites_unmatched"] == 0
    resumed = trained(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")
    assert_equal(dict(resumed.state_dict()), dict(whole.state_dict()))
    half = of_folder(tmp_path / "whole" / "checkpoint-2")
    assert_apart(hf_logits(half), hf_logits(whole), 1e-3)


def test_the_names_of_backends_that_trainer_knows(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is none of them, so layers are compiled in place; when this fails, the documents can say it simpler."""
    # TrainingArguments hands the name to accelerate through the environment.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    arguments = transformers.TrainingArguments(torch_compile_backend="dora_fx", use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="DORA_FX"):
        transformers.Trainer(of_folder(base_folder), arguments)
