"""The scripts in `examples/` run as their first lines say, and train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tests.hf_models import save_tiny_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
# Losses are printed with four decimals.
PRINTED = 1e-4


def output_of(*command: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_two_ranks(script: str, *arguments: object) -> str:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return output_of(*launcher, EXAMPLES / script, *arguments)


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
    assert_trains(on_two_ranks("pipeline_stages.py"))


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


def trained_by_trainer(out: Path, *arguments: object, first_step: int = 1) -> None:
    """Run the example of `Trainer`, and look at what it exported."""
    output = output_of(EXAMPLES / "transformers_trainer.py", out, *arguments)
    assert_trains(output, first_step)
    merged = float(re.search(r"^merged model: loss ([\d.]+)", output, re.M)[1])
    # Samples are alike, and the optimizer stepped once more after the last loss.
    assert merged < losses(output)[first_step + 4]
    exported, saved = out / f"adapter-{first_step + 4}", out / f"checkpoint-{first_step + 4}"
    logits = []
    for folder in (exported, saved):
        base = transformers.AutoModelForCausalLM.from_pretrained(out / "base")
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(base, folder)(torch.arange(32)[None] % 7).logits)
    assert torch.equal(*logits)


def test_transformers_trainer(tmp_path: Path) -> None:
    trained_by_trainer(tmp_path / "out")


@pytest.mark.slow
def test_transformers_trainer_goes_on(tmp_path: Path) -> None:
    for first_step in (1, 6):
        trained_by_trainer(tmp_path / "out", first_step=first_step)
