"""What a run does with its held-out losses: how often it measures, what it keeps, and when it stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dora_fx import DoRA
from dora_fx.app.cli.main import main, parse
from dora_fx.app.options import options_from
from dora_fx.app.training.recompute import recompute_layers
from dora_fx.checkpoint import read_adapters
from dora_fx.models import causal_mask
from tests.finetune_runs import finetune, rows, step_of
from tests.hf_models import finetune_inputs
from tests.models import GPT_TARGETS, randomize_adapters, tiny_gpt, token_ids
from tests.tables import every_case


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return finetune_inputs(tmp_path_factory.mktemp("inputs"), "--compile", "none", "--sample-tokens", 0)


def kept(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in (run / "best").iterdir()}


@every_case(
    ("options", "interval"),
    [
        (["--steps", "20"], 4),
        (["--steps", "3"], 1),
        (["--steps", "3", "--eval-every", "2"], 2),
        (["--steps", "3", "--eval-every", "0"], 0),
    ],
    ids=str,
)
def test_a_run_measures_five_times_unless_told_otherwise(options: list[str], interval: int) -> None:
    found, values = parse(["finetune", "--data", "x.txt", *options])
    assert found == "finetune" and options_from(values).measuring_interval == interval


@pytest.mark.parametrize(("every", "measured"), [(2, [0, 2, 3]), (0, [0, 3])])
def test_a_run_measures_after_so_many_steps_and_at_its_ends(
    every: int, measured: list[int], inputs: list[str], tmp_path: Path
) -> None:
    assert finetune(*inputs, "--steps", 3, "--eval-every", every, "--run", tmp_path / "run") == 0
    assert list(rows(tmp_path / "run", "held_out_loss")) == measured


def test_the_best_checkpoints_are_kept_and_exported(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--steps", 10, "--eval-every", 1, "--lr", 0.3, "--keep", 2, "--run", run) == 0
    losses = rows(run, "held_out_loss")
    trained = sorted((step for step in losses if step), key=losses.__getitem__)
    assert kept(run) == set(trained[:2])
    # The rate is too high to learn steadily; which step is best depends on the processor, and the last may be.
    found = f"at step {trained[0]}, kept in {run / 'best' / f'step_{trained[0]}'}" in capsys.readouterr().out
    assert found == (trained[0] != 10)
    best = run / "best" / f"step_{next(step for step in trained if step != 10)}"
    assert main(["export", str(best), "--to", str(tmp_path / "adapter")]) == 0
    assert main(["inspect", str(best)]) == 0
    manifest = json.loads((best / "dora_fx.json").read_text())
    assert not manifest["has_optimizer"]
    other = read_adapters(run / "checkpoint")
    for path, adapter in read_adapters(best).items():
        assert not torch.equal(adapter.tensors["linear_out.weight"], other[path].tensors["linear_out.weight"])


def test_a_resumed_run_takes_back_what_it_kept_of_steps_to_come(inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--steps", 3, "--eval-every", 1, "--keep", 9, "--run", run) == 0
    whole = {step: read_adapters(run / "best" / f"step_{step}") for step in kept(run)}
    assert whole.keys() == {1, 2, 3}
    again = tmp_path / "again"
    assert finetune(*inputs, "--steps", 2, "--eval-every", 1, "--keep", 9, "--run", again) == 0
    shutil.copytree(again / "best" / "step_2", again / "best" / "step_7")
    assert finetune("--resume", again, "--steps", 3) == 0
    assert kept(again) == {1, 2, 3}
    for path, adapter in read_adapters(again / "best" / "step_3").items():
        torch.testing.assert_close(adapter.tensors, whole[3][path].tensors, rtol=0, atol=0)


def test_none_are_kept_where_none_are_asked_for(inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune(*inputs, "--steps", 1, "--keep", 0, "--run", run) == 0
    assert not (run / "best").exists()


def test_a_run_without_patience_stops_early_and_goes_on_when_asked(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--eval-every", 2, "--lr", 0.3, "--patience", 2, "--sample-tokens", 2]
    assert finetune(*inputs, "--steps", 40, *options, "--run", run) == 0
    losses = rows(run, "held_out_loss")
    last = max(losses)
    best = min(losses, key=losses.__getitem__)
    assert last == best + 4 < 40
    assert step_of(run) == last == max(rows(run))
    assert "no lower held-out loss in 2 measurements: stopped early" in capsys.readouterr().out
    samples = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples == [0, last]
    assert finetune("--resume", run, "--patience", 0, "--steps", last + 1) == 0
    assert step_of(run) == last + 1


def test_patience_needs_something_to_count(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(*inputs, "--patience", 1, "--eval-every", 0) == 2
    assert "--patience: found --eval-every 0, expected measurements" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--compile", "none"], id="eager"),
        pytest.param(["--compile", "layer", "--inner-compiler", "aot_eager"], id="layer"),
        pytest.param(["--compile", "model", "--inner-compiler", "aot_eager"], id="model", marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_no_loss(options: list[str], inputs: list[str], tmp_path: Path) -> None:
    for name, more in (("kept", []), ("again", ["--recompute"])):
        arguments = [*options, *more, "--steps", 2, "--dropout", 0.2, "--run", tmp_path / name]
        assert finetune(*inputs, *arguments) == 0
    assert rows(tmp_path / "kept") == rows(tmp_path / "again")


@pytest.mark.usefixtures("world")
def test_recomputation_keeps_the_inputs_of_layers_alone() -> None:
    """A layer's input is held by its checkpoint; autograd keeps what is outside of layers, the final norm's."""
    kept_bytes = {}
    for name in ("kept", "again"):
        model = DoRA(GPT_TARGETS, dim=4, alpha=8)(tiny_gpt(num_layers=4))
        randomize_adapters(model)
        if name == "again":
            recompute_layers(model)
        kept_bytes[name] = bytes_kept_by_layers(model)
    hidden = token_ids().numel() * 32 * 4
    assert kept_bytes["again"] <= 8 * hidden < kept_bytes["kept"] / 8


def bytes_kept_by_layers(model: nn.Module) -> int:
    """Bytes of the tensors that the forward pass of the decoder's layers keeps, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = token_ids()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.decoder(
            hidden_states=model.embedding(tokens, positions),
            attention_mask=causal_mask(tokens.shape[1], "cpu"),
            rotary_pos_emb=model.rotary_pos_emb(tokens.shape[1]),
        )
    assert hidden.requires_grad
    return sum(found.values())
