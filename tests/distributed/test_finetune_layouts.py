"""`dora-fx finetune` at pipeline- and data-parallel sizes goes through the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_fx.app.cli.main import main
from tests.closeness import assert_close, rounding
from tests.distributed.finetune_ranks import finetune, losses
from tests.finetune_runs import ROUNDINGS_OF_A_STEP, rows
from tests.hf_models import adapter_of, finetune_inputs

STEPS = 4
BOUND = rounding(torch.float32, STEPS * ROUNDINGS_OF_A_STEP)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    options = ["--dim", 8, "--lr", 0.001, "--inner-compiler", "aot_eager", "--gradient-accumulation", 4]
    options += ["--steps", STEPS, "--save-every", 2, "--loraplus-lr-ratio", 4]
    options += ["--rank-pattern", '{"*.layers.1.*": 4}', "--use-rslora"]
    # An output layer that is tied to the embedding, on another stage.
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), *options, kind="llama_tied")


@pytest.fixture(scope="module")
def one_process(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    finetune(1, *inputs, "--run", run)
    return run


def assert_same_run(found: Path, expected: Path) -> None:
    assert_close(losses(found), losses(expected), BOUND)
    held_out = [torch.tensor(list(rows(run, "held_out_loss").values())) for run in (found, expected)]
    assert_close(*held_out, BOUND)
    assert_close(adapter_of(found), adapter_of(expected), BOUND)
    samples = [(run / "samples.jsonl").read_text() for run in (found, expected)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "more"),
    [
        (1, 2, 1, []),
        (1, 1, 2, []),
        pytest.param(1, 2, 1, ["--compile", "none"], marks=pytest.mark.slow),
        pytest.param(2, 2, 1, ["--sequence-parallel"], marks=pytest.mark.slow),
        pytest.param(1, 2, 2, [], marks=pytest.mark.slow),
        pytest.param(2, 1, 2, [], marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_what_one_process_trains(inputs, one_process, tmp_path, tp, pp, dp, more):
    run = tmp_path / "run"
    text = finetune(tp * pp * dp, *inputs, *more, "--tp", tp, "--pp", pp, "--dp", dp, "--run", run)
    assert text.count("held-out loss at step 0") == 1
    assert f"{pp} pipeline-parallel" in text or f"{dp} data-parallel" in text
    assert_same_run(run, one_process)


def test_a_run_goes_on_at_other_layouts_and_is_exported(inputs, one_process, tmp_path):
    run = tmp_path / "run"
    finetune(2, *inputs, "--pp", 2, "--steps", 2, "--run", run)
    finetune(2, "--resume", run, "--pp", 1, "--dp", 2, "--steps", 3)
    finetune(1, "--resume", run, "--dp", 1, "--steps", STEPS)
    assert_close(losses(run), losses(one_process), BOUND)
    assert_close(adapter_of(run), adapter_of(one_process), BOUND)
    assert main(["export", str(run), "--to", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_dropout_is_the_same_however_many_ranks_share_a_step(inputs, tmp_path):
    runs = {dp: tmp_path / str(dp) for dp in (1, 2)}
    for dp, run in runs.items():
        finetune(dp, *inputs, "--dropout", 0.2, "--dp", dp, "--compile", "none", "--steps", 2, "--run", run)
    assert_close(losses(runs[2]), losses(runs[1]), BOUND)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--pp", "3"], "--pp: found 3, expected a divisor of 2, the base model's layers"),
        (["--dp", "3"], "--gradient-accumulation: found 4, expected a multiple of --dp 3"),
    ],
)
def test_sizes_that_do_not_divide_are_named(inputs, tmp_path, options, error):
    text = finetune(3, *inputs, *options, "--run", tmp_path / "run", expect=2)
    assert error in text
    assert not (tmp_path / "run").exists()


def test_the_number_of_processes_is_the_product_of_the_sizes(inputs, tmp_path, capsys):
    arguments = [*inputs, "--tp", "2", "--pp", "2", "--dp", "2", "--run", str(tmp_path / "run")]
    assert main(["finetune", *arguments]) == 2
    error = capsys.readouterr().err
    assert "--tp 2 --pp 2 --dp 2: found 1 processes, expected 8" in error and "--nproc-per-node 8" in error
    assert main(["finetune", *inputs, "--pp", "2", "--compile", "model", "--run", str(tmp_path / "run")]) == 2
    assert "--compile model: found --pp above 1" in capsys.readouterr().err
