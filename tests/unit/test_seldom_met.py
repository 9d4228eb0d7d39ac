"""What few users meet: each test takes a branch that no other test takes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from safetensors.torch import save_file
from torch import nn

import dora_fx
from dora_fx.app.cli.main import main
from dora_fx.app.errors import UserError
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.models import UnsupportedModelError, architecture_of, build_gpt_model
from tests.closeness import assert_apart, assert_close
from tests.finetune_runs import finetune, rows
from tests.graph.conftest import fake_world
from tests.hf_models import finetune_inputs, tiny_hf_config, tiny_hf_model
from tests.models import IN, LinearZoo, adapt_zoo, config, tiny_gpt
from tests.peft_models import adapted_megatron, megatron_of, save_peft_adapter

# Layers


def test_a_forward_hook_of_the_user_runs(world: None) -> None:
    zoo, seen = adapt_zoo(LinearZoo(["row"])), []
    handle = zoo.row.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    zoo({"row": torch.ones(2, IN)})
    handle.remove()
    zoo({"row": torch.ones(2, IN)})
    assert seen == [(2, IN)]


def test_an_adapter_shows_its_settings(world: None) -> None:
    shown = repr(adapt_zoo(LinearZoo(["row_bias_added"]), dropout=0.25))
    for text in ("dim=6, alpha=12, use_rslora=False, dropout=0.25, layout=row", "shape=(6, 24), dtype=torch.float32"):
        assert text in shown


def test_an_overlapping_gather_that_was_there_first_is_refused(world: None) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True)
    with cuda_means_cpu():
        model = DistributedDataParallel(config(), settings, module)
    with pytest.raises(ValueError, match="found overlap_param_gather=True, expected False"):
        dora_fx.DoRA(["0"], dim=2)(model)
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("change", ["linear_in", "linear_out"])
def test_writes_into_tensors_made_in_inference_mode_are_noticed(change: str, world: None) -> None:
    """They have no version, so nothing may be remembered of them."""
    with torch.inference_mode():
        zoo = adapt_zoo(LinearZoo(["row"]).double())
        call = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "eager"})
        x = {"row": torch.randn(3, IN, dtype=torch.float64)}
        before = call(x)["row"].clone()
        getattr(zoo.row.adapter, change).weight.mul_(1.5)
        assert_apart(call(x)["row"], before, least=0.01)
        assert_close(call(x), zoo(x), 1e-12)


def test_merging_on_the_meta_device_is_refused(world: None) -> None:
    zoo = adapt_zoo(LinearZoo(["row"])).to("meta")
    with pytest.raises(ValueError, match="row: the base weight is on the meta device; load it before merging"):
        dora_fx.merge(zoo)


# Hugging Face


def test_models_and_layers_without_a_counterpart_are_not_exported(world: None, tmp_path: Path) -> None:
    plain = dora_fx.DoRA(["0"], dim=2)(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="found a Sequential, expected a Megatron GPTModel"):
        dora_fx.export_hf(plain, tmp_path / "new")
    model = tiny_gpt()
    model.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"extra: found no Hugging Face layer that it stands for, expected one of"):
        dora_fx.export_hf(dora_fx.DoRA(["extra"], dim=2)(model), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_importing_leaves_a_layer_without_a_counterpart_alone(world: None, tmp_path: Path) -> None:
    hf = tiny_hf_model()
    dora_fx.export_hf(adapted_megatron(hf), tmp_path / "adapter")
    model = megatron_of(hf)
    model.extra = nn.Linear(4, 4)
    dora_fx.import_hf(model, tmp_path / "adapter")
    assert type(model.extra) is nn.Linear


def test_adapter_files_without_content_are_refused(world: None, tmp_path: Path) -> None:
    hf, folder = tiny_hf_model(), tmp_path / "adapter"
    save_peft_adapter(hf, folder)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: found no tensor, expected an adapter's"):
        dora_fx.import_hf(megatron_of(hf), folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json: found a list, expected an object"):
        dora_fx.import_hf(megatron_of(hf), folder)


def test_a_tied_output_layer_is_not_merged_into_a_base(
    world: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune_inputs(tmp_path, kind="llama_tied")
    model = adapted_megatron(tiny_hf_model("llama_tied"), ["output_layer"])
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint")
    arguments = ["merge", tmp_path / "checkpoint", "--base", tmp_path / "base", "--to", tmp_path / "new"]
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert "lm_head.weight: the weight is tied to the embedding" in error
    assert "dora-fx export" in error and "without output_layer" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(num_attention_heads=6, num_key_value_heads=4), "num_key_value_heads = 4, .* expected a divisor of 6"),
        (
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
            "rope_parameters.partial_rotary_factor = 0.5",
        ),
    ],
)
def test_other_unsupported_features_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        architecture_of(tiny_hf_config(**overrides))


def test_a_tensor_of_another_shape_than_the_config_says_is_named(world: None) -> None:
    hf = tiny_hf_model()
    tensors = dict(hf.state_dict()) | {"model.norm.weight": torch.ones(47)}
    with pytest.raises(ValueError, match=r"final_layernorm.weight: the checkpoint has \(47,\), expected \(48,\)"):
        build_gpt_model(hf.config, tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "ffn_hidden_size is 80, expected a multiple of the tensor-parallel size 3"),
        (dict(num_query_groups=4), "num_query_groups is 4, expected a multiple of the tensor-parallel size 3"),
    ],
)
def test_a_size_that_does_not_divide_by_the_ranks_is_named(settings: dict[str, Any], message: str) -> None:
    hf = tiny_hf_model()
    with fake_world(3), pytest.raises(ValueError, match=message):
        build_gpt_model(hf.config, hf.state_dict(), **settings)


# The command


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Options of a short run."""
    return finetune_inputs(tmp_path, "--compile", "none", "--steps", 2, "--run", tmp_path / "run")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown


def test_a_library_that_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert 'jsonargparse is not installed; the command needs: pip install "dora-fx[demo]"' in error_of(
        capsys, "inspect"
    )


def test_a_prompt_is_continued_and_an_empty_one_refused(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--prompt: found no token in it" in error_of(capsys, "finetune", *inputs, "--prompt", "")
    assert finetune(*inputs, "--run", tmp_path / "prompted", "--prompt", "the fox") == 0
    samples = (tmp_path / "prompted" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 and all('"prompt": "t h e   f o x"' in sample for sample in samples)


def test_a_run_below_a_file_is_refused(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    assert f"--run {run}: Not a directory" in error_of(capsys, "finetune", *inputs, "--run", run)


def test_a_sequence_that_does_not_divide_by_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"--sequence-length: found 33, expected a multiple of --tp 2"):
        FinetuneOptions(demo="text", tp=2, sequence_parallel=True, sequence_length=33)


def test_a_terminal_shows_a_bar(
    inputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert finetune(*inputs) == 0
    shown = capsys.readouterr().out
    assert "training" in shown and "2/2" in shown and "loss " in shown
    assert "step 1/2" not in shown


def test_a_run_in_another_thread_leaves_signals_alone(inputs: list[str], tmp_path: Path) -> None:
    """Python sets handlers in the main thread only."""
    outcome: list[int] = []
    run: Callable[[], None] = lambda: outcome.append(finetune(*inputs))  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outcome == [0]
    assert list(rows(tmp_path / "run")) == [1, 2]
