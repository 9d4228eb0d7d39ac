"""`dora-fx export` from a run folder to what PEFT and transformers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dora_fx
from dora_fx.cli.main import main
from dora_fx.megatron_world import megatron_world
from dora_fx.models import load_hf_checkpoint
from tests.hf_models import finetune_inputs
from tests.peft_models import hf_logits, load_with_peft, megatron_logits, megatron_of


def dora_fx_command(*arguments: object) -> int:
    torch._dynamo.reset()
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a tiny Qwen2."""
    folder = tmp_path_factory.mktemp("export")
    inputs = finetune_inputs(folder, "--lr", 0.02, "--compile", "none", "--steps", 6, "--dim", 4, kind="qwen2")
    assert dora_fx_command("finetune", *inputs, "--run", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def base(run: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(run.parent / "base", attn_implementation="eager")


@pytest.fixture(scope="module")
def expected(run: Path, base: torch.nn.Module) -> torch.Tensor:
    """Logits of the Megatron model with the run's adapter."""
    with megatron_world():
        model = dora_fx.DoRA(dim=4, alpha=32.0)(megatron_of(base))
        missing, unexpected = model.load_state_dict(load_file(run / "adapter.safetensors"), strict=False)
        assert unexpected == [] and not any(".adapter." in name for name in missing)
        logits = megatron_logits(model)
    assert (logits - hf_logits(base)).abs().max() > 0.1
    return logits


def test_peft_loads_the_adapter(
    run: Path, base: torch.nn.Module, expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dora_fx_command("export", run, "--to", tmp_path / "peft") == 0
    assert f"PEFT adapter of {run.parent / 'base'}: {tmp_path / 'peft'}" in capsys.readouterr().out
    torch.testing.assert_close(hf_logits(load_with_peft(base, tmp_path / "peft")), expected, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.parent / "base")
    assert dora_fx_command("export", run, "--to", tmp_path / "named", "--base-name", "me/base") == 0
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"


def test_transformers_loads_the_merged_model(run: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    assert dora_fx_command("export", run, "--to", tmp_path / "merged", "--merged") == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(hf_logits(model), expected, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer("hello").input_ids).replace(" ", "") == "hello"
    # What was merged is a base like any other.
    assert load_hf_checkpoint(tmp_path / "merged").state_dict.keys() == model.state_dict().keys()


def test_what_cannot_be_exported_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(message: str, *arguments: object) -> None:
        assert dora_fx_command("export", *arguments) == 2
        assert message in capsys.readouterr().err

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    refuse(f"--to {tmp_path / 'taken'}: it exists, expected a name that is free", run, "--to", tmp_path / "taken")
    refuse("there is no adapter.json, expected the folder of a saved run", tmp_path, "--to", tmp_path / "new")
    refuse("--base-name: leave it out with --merged", run, "--to", tmp_path / "new", "--merged", "--base-name", "x")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    description = json.loads((run / "adapter.json").read_text())
    (damaged / "adapter.json").write_text(json.dumps(description | {"dim": 5}))
    refuse("found an adapter of dim 4, adapter.json says 5", damaged, "--to", tmp_path / "new")
    (damaged / "adapter.json").write_text(json.dumps(description | {"base": str(tmp_path / "gone")}))
    refuse(f"{tmp_path / 'gone'}: no such file or directory", damaged, "--to", tmp_path / "new")
    (damaged / "adapter.json").write_text("{")
    refuse("adapter.json: cannot be read", damaged, "--to", tmp_path / "new")
    (damaged / "adapter.json").write_text(json.dumps(description))
    tensors = load_file(run / "adapter.safetensors")
    name = next(name for name in tensors if name.endswith("weight_magnitude"))
    save_file({key: value for key, value in tensors.items() if key != name}, damaged / "adapter.safetensors")
    refuse("expected ['linear_in.weight', 'linear_out.weight', 'weight_magnitude']", damaged, "--to", tmp_path / "new")
    (damaged / "adapter.safetensors").write_bytes(b"half a file")
    refuse("adapter.safetensors: cannot be read", damaged, "--to", tmp_path / "new")
    assert not (tmp_path / "new").exists()
