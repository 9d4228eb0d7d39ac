"""`dora-fx export` and `dora-fx merge`, from a run or a checkpoint to what PEFT and transformers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import dora_fx
from dora_fx.app.cli.main import main
from dora_fx.megatron.world import megatron_world
from dora_fx.models import load_hf_checkpoint
from tests.closeness import assert_apart
from tests.hf_models import adapter_of, finetune_inputs, save_tiny_checkpoint
from tests.models import GPT_TARGETS, randomize_adapters, tiny_gpt
from tests.peft_models import assert_same_logits, hf_logits, load_with_peft, megatron_logits, megatron_of


def dora_fx_command(*arguments: object) -> int:
    torch._dynamo.reset()
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a tiny Qwen2."""
    folder = tmp_path_factory.mktemp("export")
    inputs = finetune_inputs(folder, "--lr", 0.02, "--compile", "none", "--steps", 6, "--dim", 4, kind="qwen2")
    assert dora_fx_command("finetune", *inputs, "--dropout", 0.1, "--run", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def base(run: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(run.parent / "base", attn_implementation="eager")


@pytest.fixture(scope="module")
def expected(run: Path, base: torch.nn.Module) -> torch.Tensor:
    """Logits of the Megatron model with the run's adapter."""
    with megatron_world():
        model = dora_fx.DoRA(dim=4, alpha=32.0)(megatron_of(base))
        dora_fx.load_checkpoint(model, run / "checkpoint")
        logits = megatron_logits(model)
    assert_apart(logits, hf_logits(base))
    return logits


def test_peft_loads_the_adapter(
    run: Path, base: torch.nn.Module, expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_fx_command("export", run, "--to", tmp_path / "peft") == 0
    assert f"PEFT adapter of {run.parent / 'base'}: {tmp_path / 'peft'}" in capsys.readouterr().out
    adapted = load_with_peft(base, tmp_path / "peft")
    assert_same_logits(hf_logits(adapted), expected, adapted)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.parent / "base")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.1)
    assert dora_fx_command("export", run, "--to", tmp_path / "named", "--base-name", "me/base") == 0
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"


def test_transformers_loads_the_merged_model(run: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    assert dora_fx_command("merge", run, "--to", tmp_path / "merged") == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_logits(hf_logits(model), expected, model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer("hello").input_ids).replace(" ", "") == "hello"
    # What was merged is a base like any other.
    assert load_hf_checkpoint(tmp_path / "merged").state_dict.keys() == model.state_dict().keys()


def test_a_checkpoint_is_exported_and_merged_as_the_run_that_it_is_of(run: Path, tmp_path: Path) -> None:
    """Also while a save is taking its place."""
    shutil.copytree(run / "checkpoint", tmp_path / ".checkpoint.previous")
    options = tmp_path / "checkpoint", "--base", run.parent / "base"
    for command, file in (("export", "adapter_model.safetensors"), ("merge", "model.safetensors")):
        assert dora_fx_command(command, run, "--to", tmp_path / command / "run") == 0
        assert dora_fx_command(command, *options, "--to", tmp_path / command / "checkpoint") == 0
        found, expected = (load_file(tmp_path / command / name / file) for name in ("checkpoint", "run"))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_bfloat16_run_is_merged_in_bfloat16(tmp_path: Path) -> None:
    inputs = finetune_inputs(tmp_path, "--dtype", "bf16", "--compile", "none", "--steps", 2)
    assert dora_fx_command("finetune", *inputs, "--run", tmp_path / "run") == 0
    assert {str(t.dtype) for name, t in adapter_of(tmp_path / "run").items() if "linear" in name[-17:]} == {
        "torch.bfloat16"
    }
    assert dora_fx_command("merge", tmp_path / "run", "--to", tmp_path / "merged") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_cannot_be_exported_is_named(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(message: str, *arguments: object) -> None:
        capsys.readouterr()
        assert dora_fx_command(command, *arguments) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1

    new = "--to", tmp_path / "new"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refuse(f"--to {tmp_path / 'taken'}: it exists, expected a name that is free", run, "--to", tmp_path / "taken")
    refuse(f"{tmp_path}: found no config.yaml of a run, which names the base; give --base", tmp_path, *new)
    base = "--base", run.parent / "base"
    refuse("the directory has no dora_fx.json, so it is no checkpoint", tmp_path, *base, *new)
    refuse("--base gone: no such file or directory", run, "--base", "gone", *new)
    save_tiny_checkpoint(tmp_path / "shallow", num_hidden_layers=1)
    message = "decoder.layers.1.self_attention.linear_proj: found an adapter of it, expected one of the 1 layers"
    refuse(message, run, "--base", tmp_path / "shallow", *new)
    save_tiny_checkpoint(tmp_path / "narrow", intermediate_size=60)
    message = "linear_fc1: found an adapter for a weight of shape (160, 48), the base's has (120, 48)"
    refuse(message, run, "--base", tmp_path / "narrow", *new)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (damaged / "config.yaml").write_text(yaml.safe_dump(config | {"base": str(tmp_path / "gone")}))
    refuse(f"{tmp_path / 'gone'}: no such file or directory", damaged, *new)
    (damaged / "config.yaml").write_text("[")
    refuse(f"{damaged / 'config.yaml'}: cannot be read (ParserError: ", damaged, *new)
    (damaged / "config.yaml").write_text("steps: 3")
    refuse(f"{damaged / 'config.yaml'}: found no base in it; give --base", damaged, *new)
    data = damaged / "checkpoint" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    refuse(f"{data}: found {data.stat().st_size} bytes, expected {data.stat().st_size + 1}", damaged, *base, *new)
    shutil.rmtree(damaged / "checkpoint")
    refuse(f"{damaged}: there is no checkpoint, the run was stopped before it saved one", damaged, *base, *new)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "phi3"])
@pytest.mark.parametrize("targets", [[*GPT_TARGETS, "output_layer"], ["*.layers.1.*"]], ids=["alike", "unlike"])
def test_an_adapter_is_merged_into_its_own_base_alone(
    kind: str, targets: list[str], world: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another base of the same shapes differs in one weight, of an adapted layer."""
    save_tiny_checkpoint(tmp_path / "own", kind)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    model = dora_fx.DoRA(targets, dim=4, alpha=8)(megatron_of(hf))
    randomize_adapters(model)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint")
    assert dora_fx_command("merge", tmp_path / "checkpoint", "--base", tmp_path / "own", "--to", tmp_path / "new") == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", attn_implementation="eager")
    assert_same_logits(hf_logits(merged), megatron_logits(model), model)
    other = shutil.copytree(tmp_path / "own", tmp_path / "other")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] += 0.01
    hf.save_pretrained(other)
    assert dora_fx_command("merge", tmp_path / "checkpoint", "--base", other, "--to", tmp_path / "newer") == 2
    shown = capsys.readouterr().err
    assert f"--base {other}: {tmp_path / 'checkpoint'}: was trained on another base model than this one" in shown
    assert "linear_fc2.weight differ" in shown and not (tmp_path / "newer").exists()


def test_adapters_that_one_file_of_peft_cannot_hold_are_named(
    run: Path, world: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = "--base", run.parent / "base", "--to", tmp_path / "new"
    model = tiny_gpt(hidden_size=48, ffn_hidden_size=80)
    for layer, dropout in enumerate((0.1, 0.2)):
        dora_fx.DoRA([f"*.layers.{layer}.mlp.linear_fc2"], dim=4, dropout=dropout)(model)
    dora_fx.save_checkpoint(model, tmp_path / "dropouts")
    assert dora_fx_command("export", tmp_path / "dropouts", *new) == 2
    assert "found adapters with dropout [0.1, 0.2], expected one for all" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
