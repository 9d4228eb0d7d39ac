"""`dora-fx finetune --tp` under torchrun goes through the losses of one process and writes the same adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.distributed.finetune_ranks import finetune, losses
from tests.finetune_runs import ROUNDINGS_OF_A_STEP
from tests.hf_models import adapter_of, finetune_inputs, tiny_tokenizer

# Three query groups: two ranks need a fourth, which is padding.
GROUPS = 3
STEPS = 6
BOUND = rounding(torch.float32, STEPS * ROUNDINGS_OF_A_STEP)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    options = ["--dim", 8, "--dropout", 0.1, "--lr", 0.001, "--inner-compiler", "aot_eager"]
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), *options, num_key_value_heads=GROUPS)


def torchrun(*command: str, expect: int = 0) -> str:
    """Run a command in two processes that torchrun starts; returns what all of them wrote."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(start, capture_output=True, text=True, timeout=240, env=environment)
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == (expect == 0), text
    return text


@pytest.fixture(scope="module")
def one_process(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    finetune(1, *inputs, "--steps", STEPS, "--run", run)
    return run


def assert_same_losses(found: Path, expected: Path) -> None:
    assert_close(losses(found), losses(expected), BOUND)


def assert_same_run(found: Path, expected: Path) -> None:
    assert_same_losses(found, expected)
    assert_close(adapter_of(found), adapter_of(expected), BOUND)
    samples = [(run / "samples.jsonl").read_text() for run in (found, expected)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_ranks_train_what_one_trains(inputs, one_process, tmp_path, sequence_parallel):
    run = tmp_path / "run"
    flags = ["--sequence-parallel"] if sequence_parallel else []
    arguments = map(str, [*inputs, "--steps", STEPS, "--run", run, "--tp", 2, *flags])
    text = torchrun("-m", "--", "dora_fx.app.cli.main", "finetune", *arguments)
    assert text.count("held-out loss at step 0") == 1
    assert_same_run(run, one_process)


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_resumes_at_another_tensor_parallel_size(inputs, one_process, tmp_path, first, then):
    run = tmp_path / "run"
    finetune(first, *inputs, "--steps", 3, "--run", run, "--tp", first)
    finetune(then, "--resume", run, "--steps", STEPS, "--tp", then)
    assert_same_losses(run, one_process)


def test_a_rank_that_was_told_something_else_ends_the_run(inputs, tmp_path):
    run = tmp_path / "run"
    # The last of an option counts.
    text = finetune(2, *inputs, "--run", run, "--tp", 2, of_rank_1=["--dim", "16"], expect=2)
    assert "rank 1 differs from rank 0: dim is 16 and 8" in text
    assert not run.exists()


def test_a_rank_that_fails_alone_ends_the_run_with_its_error(inputs, tmp_path):
    """Rank 0 waits for it in a collective."""
    script = f'exec {sys.executable} -m dora_fx.app.cli.main finetune "$@" --sequence-length $((32 + 100000 * RANK))'
    arguments = map(str, [*inputs, "--run", tmp_path / "run", "--tp", 2])
    text = torchrun("--no-python", "--", "bash", "-c", script, "finetune", *arguments, expect=2)
    assert "dora-fx, rank 1: error: --sequence-length: found 100032" in text
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_model_does_not_have_is_not_trained_on(tmp_path):
    """Each rank would take it for another's, and none has it."""
    inputs = finetune_inputs(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text() + "<two>")
    text = finetune(2, *inputs, "--run", tmp_path / "run", "--tp", 2, expect=2)
    assert "the text has the token '<two>' with id 64, expected an id below 64, the model's vocabulary" in text
    assert not (tmp_path / "run").exists()


def test_the_number_of_processes_must_be_the_tensor_parallel_size(inputs, tmp_path):
    text = finetune(1, *inputs, "--run", tmp_path / "run", "--tp", 2, expect=2)
    assert "--tp 2: found 1 processes, expected 2, the product of the parallel sizes" in text


def test_sequence_parallelism_needs_tensor_parallelism(inputs, tmp_path):
    text = finetune(1, *inputs, "--run", tmp_path / "run", "--sequence-parallel", expect=2)
    assert "--sequence-parallel: found --tp 1" in text
