"""Optimizer state in checkpoints, on one rank: what is refused, and states at their edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.pipeline_gpt import Kind, Layout, Training, trained_parameters

pytestmark = pytest.mark.usefixtures("world")

KINDS = [Kind(), Kind(optimizer="bf16"), Kind(optimizer="distributed")]


def state_of(training: Training) -> list[torch.Tensor]:
    """Everything that a step changes: parameters, and the optimizer's copies, moments and counts."""
    tensors = [parameter for _, parameter, _ in trained_parameters(training.chunks)]
    for single in training.optimizer.chained_optimizers:
        for group in single.optimizer.param_groups:
            for parameter in group["params"]:
                state = single.optimizer.state[parameter]
                tensors += [parameter, *(state[name] for name in sorted(state))]
    return [tensor.detach().clone() for tensor in tensors]


def trained(kind: Kind, steps: int, salt: str = "") -> Training:
    training = Training(Layout(), kind, salt)
    for number in range(steps):
        training.step(number)
    return training


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_training_goes_on_as_if_it_had_not_stopped(kind: Kind, steps: int, tmp_path: Path) -> None:
    whole = trained(kind, steps)
    dora_fx.save_checkpoint(whole.chunks, tmp_path / "checkpoint", whole.optimizer)
    resumed = trained(kind, 3, " of another run")
    dora_fx.load_checkpoint(resumed.chunks, tmp_path / "checkpoint", resumed.optimizer)
    for number in range(steps, steps + 2):
        whole.step(number)
        resumed.step(number)
    torch.testing.assert_close(state_of(resumed), state_of(whole), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saving_changes_nothing(kind: Kind, tmp_path: Path) -> None:
    saved, other = trained(kind, 0), trained(kind, 0)
    dora_fx.save_checkpoint(saved.chunks, tmp_path / "checkpoint", saved.optimizer)
    saved.step(0)
    other.step(0)
    torch.testing.assert_close(state_of(saved), state_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_refused_load_leaves_the_optimizer_as_it_was(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    source, target = trained(kind, 2), trained(kind, 3, " of another run")
    dora_fx.save_checkpoint(source.chunks, path, source.optimizer)
    (path / "common.pt").write_bytes(b"")
    before = state_of(target)
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        dora_fx.load_checkpoint(target.chunks, path, target.optimizer)
    torch.testing.assert_close(state_of(target), before, rtol=0, atol=0)


def test_the_state_of_another_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    source, target = trained(Kind(optimizer="bf16"), 2), trained(Kind(optimizer="distributed"), 1, " of another run")
    dora_fx.save_checkpoint(source.chunks, path, source.optimizer)
    before = state_of(target)
    with pytest.raises(CheckpointError, match="expected the optimizer it was saved with"):
        dora_fx.load_checkpoint(target.chunks, path, target.optimizer)
    torch.testing.assert_close(state_of(target), before, rtol=0, atol=0)
    never_asked = trained(Kind(optimizer="distributed"), 1, " of another run")
    for training in (target, never_asked):
        training.step(1)
    torch.testing.assert_close(state_of(target), state_of(never_asked), rtol=0, atol=0)


def test_adapters_without_the_optimizer_that_was_saved(tmp_path: Path) -> None:
    source, target = trained(Kind(), 2), trained(Kind(), 0, " of another run")
    dora_fx.save_checkpoint(source.chunks, tmp_path / "checkpoint", source.optimizer)
    dora_fx.load_checkpoint(target.chunks, tmp_path / "checkpoint")
    pairs = zip(trained_parameters(target.chunks), trained_parameters(source.chunks), strict=True)
    assert all(torch.equal(found, expected) for (_, found, _), (_, expected, _) in pairs)
