"""The scripts in `examples/` run as their first lines say, and train."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tests.distributed.finetune_ranks import as_torchrun_does
from tests.hf_models import save_tiny_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO_DATA = EXAMPLES.parent / "dora_fx" / "app" / "data" / "pirate.jsonl"
# Losses are printed with four decimals.
PRINTED = 1e-4
# Seconds that say nothing of an example, only that it will not end: one that takes 80 took over 300 beside other work.
HUNG = 1500


def output_of(*command: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=HUNG, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def under_torchrun(script: str) -> str:
    return output_of("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLES / script)


def on_two_ranks(script: str, *arguments: object) -> str:
    """As under torchrun, by processes that have imported everything."""
    return as_torchrun_does(2, run_script, EXAMPLES / script, list(map(str, arguments)), seconds=HUNG)


def run_script(rank: int, script: Path, arguments: list[str]) -> None:
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def losses(output: str) -> dict[int, float]:
    """The loss of each step that a script printed."""
    found = re.findall(r"^step (\d+): loss ([\d.]+)", output, re.MULTILINE)
    assert len(found) == 5, output
    return {int(step): float(loss) for step, loss in found}


def assert_trains(output: str, first_step: int = 1) -> None:
    by_step = losses(output)
    assert list(by_step) == list(range(first_step, first_step + 5))
    assert sorted(by_step.values(), reverse=True) == list(by_step.values()), output
    assert by_step[first_step] - by_step[first_step + 4] > 0.05, output


def test_megatron_training(tmp_path: Path) -> None:
    assert_trains(on_two_ranks("megatron_training.py", tmp_path / "out"))
    assert (tmp_path / "out" / "dora_fx.json").is_file()


@pytest.mark.slow
def test_megatron_training_goes_on_at_another_layout(tmp_path: Path) -> None:
    assert_trains(on_two_ranks("megatron_training.py", tmp_path / "out", 2))
    assert_trains(on_two_ranks("megatron_training.py", tmp_path / "out", 1), first_step=6)


def test_pipeline_stages() -> None:
    assert_trains(under_torchrun("pipeline_stages.py"))


@pytest.mark.slow
def test_hugging_face_model_of_its_own(tmp_path: Path) -> None:
    output = output_of(EXAMPLES / "hugging_face.py", tmp_path / "out")
    assert_trains(output)
    assert "8 layers adapted" in output


@pytest.fixture
def example_of_a_base(tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    base, out = save_tiny_checkpoint(tmp_path / "base"), tmp_path / "out"
    yield output_of(EXAMPLES / "hugging_face.py", out, base), base, out


def test_the_adapter_of_a_hugging_face_model_is_peft_s(example_of_a_base: tuple[str, Path, Path]) -> None:
    output, base, out = example_of_a_base
    assert_trains(output)
    adapted, merged = (
        float(re.search(rf"^{name} model: loss ([\d.]+)", output, re.M)[1]) for name in ("adapted", "merged")
    )
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    [text] = re.findall(r'^TEXT = "(.*)"$', (EXAMPLES / "hugging_face.py").read_text(), re.MULTILINE)
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :33]
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss.item()
    assert merged == pytest.approx(adapted, abs=PRINTED)
    assert adapted == pytest.approx(expected, abs=PRINTED)


@pytest.mark.slow
def test_trainer_on_a_base_in_4_bits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = output_of(EXAMPLES / "quantised_trainer.py", out)
    by_step = losses(output)
    assert list(by_step) == [1, 2, 3, 4, 5] and by_step[5] < by_step[1] - 0.05, output
    adapted, merged = (
        float(re.search(rf"^{name} model: loss ([\d.]+)", output, re.M)[1]) for name in ("adapted", "merged")
    )
    assert merged == pytest.approx(adapted, abs=PRINTED) and (out / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_transformers_trainer_and_its_second_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for first_step in (1, 6):
        output = output_of(EXAMPLES / "transformers_trainer.py", out)
        assert_trains(output, first_step)
        merged = float(re.search(r"^merged model: loss ([\d.]+)", output, re.M)[1])
        # Samples are alike, and the optimizer stepped once more after the last loss.
        assert merged < losses(output)[first_step + 4]
        logits = []
        for name in ("adapter", "checkpoint"):
            base = transformers.AutoModelForCausalLM.from_pretrained(out / "base")
            with torch.no_grad():
                model = peft.PeftModel.from_pretrained(base, out / f"{name}-{first_step + 4}")
                logits.append(model(torch.arange(32)[None] % 7).logits)
        assert torch.equal(*logits)


@pytest.mark.slow
def test_preferences_and_their_second_run(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the example trains with TRL")
    margins: dict[int, list[float]] = {}
    for run in (1, 2):
        output = output_of(EXAMPLES / "preference_dpo.py", tmp_path / "out")
        found = re.findall(r"^step \d+: loss ([\d.]+), margin ([\d.]+), accuracy", output, re.M)
        margins[run] = [float(margin) for _, margin in found]
        assert len(found) == 10 and margins[run][-1] > margins[run][0] + 0.1, output
        # The pairs' order differs between steps, so the loss is compared with the margin of its own step.
        assert float(found[0][0]) <= math.log(2) + PRINTED
        [change] = re.findall(r"^reference: log-probabilities changed by (\S+) of the largest", output, re.M)
        assert float(change) < 16 * torch.finfo(torch.float32).eps
        assert (tmp_path / "out" / f"adapter-{run}" / "adapter_model.safetensors").is_file()
    # A fresh adapter is the reference itself. The reference of a trained one is still the base, and not where it began.
    assert margins[1][0] == pytest.approx(0, abs=PRINTED)
    assert margins[2][0] > margins[1][4]


@pytest.mark.slow
def test_a_policy_and_its_reference_in_two_runs(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the example trains with TRL")
    for run in (1, 2):
        output = output_of(EXAMPLES / "policy_grpo.py", tmp_path / "out")
        found = re.findall(r"^step \d+: reward [\d.]+, kl ([\d.]+)", output, re.M)
        # The reference is the base at first, and then the adapter of the run before: what each run begins with.
        assert len(found) == 12 and float(found[0]) == 0 and min(map(float, found[2:])) > 0, output
        assert re.search(r"^reference: logits changed by 0\.0e\+00$", output, re.M), output
        assert (tmp_path / "out" / f"adapter-{run}" / "adapter_model.safetensors").is_file()


def test_preferences_prefer_the_pirate() -> None:
    """The demo's answers are the chosen ones, and each rejected one answers the same question."""
    demo = {
        question["content"]: answer["content"]
        for line in DEMO_DATA.read_text(encoding="utf-8").splitlines()
        for question, answer in [json.loads(line)["messages"]]
    }
    lines = (EXAMPLES / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12
    for pair in map(json.loads, lines):
        assert list(pair) == ["prompt", "chosen", "rejected"]
        [question], [chosen], [rejected] = pair.values()
        assert demo[question["content"]] == chosen["content"] != rejected["content"]
        assert {question["role"], chosen["role"], rejected["role"]} == {"user", "assistant"}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_refreshed_inference(dtype: str) -> None:
    output = on_two_ranks("refresh_inference.py", dtype)
    assert_trains(output)
    gaps = [float(gap) for gap in re.findall(r"^step .*, largest (\S+)$", output, re.M)]
    assert len(gaps) == 5
    # Log-probabilities are about four; two models round them otherwise by some units in the last place.
    assert 0 < max(gaps) < 16 * torch.finfo(getattr(torch, dtype)).eps
    table = re.findall(r"^(decoder\.layers\.\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", output, re.M)
    assert len(table) == 8
    assert re.search(rf"^log-probabilities of 64 tokens, merged in {dtype}: mean gap ", output, re.M)
