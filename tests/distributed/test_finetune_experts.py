"""`dora-fx finetune` of a base with experts: its ranks share them, and go through the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import dora_fx
from dora_fx.app.cli.main import main
from dora_fx.checkpoint import open_checkpoint
from dora_fx.megatron import megatron_world
from dora_fx.models import build_gpt_model
from tests.closeness import assert_apart, assert_close, rounding
from tests.distributed.finetune_ranks import finetune, losses
from tests.finetune_runs import ROUNDINGS_OF_A_STEP, rows
from tests.hf_models import adapter_of, finetune_inputs, tiny_hf_model
from tests.models import GPT_TARGETS, sites
from tests.peft_models import hf_logits, megatron_logits

STEPS = 4
BOUND = rounding(torch.float32, STEPS * ROUNDINGS_OF_A_STEP)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    options = ["--dim", 4, "--lr", 0.001, "--compile", "none", "--gradient-accumulation", 2, "--steps", STEPS]
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), *options, kind="qwen3_moe")


@pytest.fixture(scope="module")
def one_process(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    finetune(1, *inputs, "--run", run)
    return run


@pytest.mark.parametrize(
    "sizes",
    [
        "--dp 2 --ep 2",
        pytest.param(
            "--tp 2 --etp 2 --sequence-parallel --compile layer --inner-compiler aot_eager", marks=pytest.mark.slow
        ),
        pytest.param("--tp 2 --ep 2 --etp 1 --sequence-parallel", marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_what_one_process_trains(
    sizes: str, inputs: list[str], one_process: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finetune(2, *inputs, *sizes.split(), "--run", run)
    assert_close(losses(run), losses(one_process), BOUND)
    held_out = [torch.tensor(list(rows(each, "held_out_loss").values())) for each in (run, one_process)]
    assert_close(*held_out, BOUND)
    assert_close(adapter_of(run), adapter_of(one_process), BOUND)
    assert main(["merge", str(run), "--to", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_close(hf_logits(merged), logits_of_the_run(run), BOUND)
    assert_apart(hf_logits(merged), hf_logits(tiny_hf_model("qwen3_moe")))


def logits_of_the_run(run: Path) -> torch.Tensor:
    """Of the base with the run's adapters beside it, in Megatron."""
    hf = tiny_hf_model("qwen3_moe")
    with megatron_world():
        model = dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=32)(build_gpt_model(hf.config, hf.state_dict()))
        dora_fx.load_checkpoint(model, run / "checkpoint")
        return megatron_logits(model)


@pytest.mark.slow
def test_a_run_goes_on_at_another_layout_and_is_exported(inputs: list[str], one_process: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(2, *inputs, "--dp", 2, "--ep", 2, "--steps", 2, "--run", run)
    assert {"ep": 2, "etp": 1, "dp": 2}.items() <= open_checkpoint(run / "checkpoint")[1].layout.items()
    finetune(1, "--resume", run, "--dp", 1, "--ep", 1, "--steps", STEPS)
    assert_close(losses(run), losses(one_process), BOUND)
    assert main(["export", str(run), "--to", str(tmp_path / "adapter")]) == 0
    hf = tiny_hf_model("qwen3_moe")
    with megatron_world():
        model = dora_fx.import_hf(build_gpt_model(hf.config, hf.state_dict()), tmp_path / "adapter")
        found = megatron_logits(model)
    assert_close(found, logits_of_the_run(run), BOUND)


@pytest.mark.slow
def test_adapters_of_some_experts_are_merged_into_these_alone(inputs: list[str], tmp_path: Path) -> None:
    run, targets = tmp_path / "run", ["--target-modules", "*.local_experts.1-2.*", "--steps", 1]
    finetune(2, *inputs, *targets, "--dp", 2, "--ep", 2, "--run", run)
    for command, folder in (("merge", "merged"), ("export", "adapter")):
        assert main([command, str(run), "--to", str(tmp_path / folder)]) == 0
    hf = tiny_hf_model("qwen3_moe")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, base in hf.state_dict().items():
        changed = [not torch.equal(*pair) for pair in zip(merged[name], base, strict=True)]
        assert changed == ([False, True, True, False] if ".experts." in name else [False] * len(base)), name
    with megatron_world():
        model = dora_fx.import_hf(build_gpt_model(hf.config, hf.state_dict()), tmp_path / "adapter")
        assert len(sites(model)) == 2 * 2 * 2
