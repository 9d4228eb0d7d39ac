"""A checkpoint of experts saved at one layout and loaded at another holds the same bits, optimizer state included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dora_fx
from dora_fx.checkpoint import read_adapters
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import (
    EXPERTS,
    LAYERS,
    Kind,
    Layout,
    Training,
    expected_adapters,
    trained_parameters,
)
from tests.distributed.test_checkpoint_reshaping import assert_same_checkpoint, reshape
from tests.distributed.test_checkpoint_torch_optimizer_ranks import Training as TorchTraining

slow = pytest.mark.slow
LAYOUTS = [
    Layout(),
    Layout(dp=2, ep=2),
    Layout(tp=2, etp=1),
    Layout(tp=2, ep=2, etp=1),
    Layout(pp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=4, etp=1),
]
KINDS = [Kind(experts=True, sequence_parallel=True, optimizer=name) for name in ("fp32", "bf16", "distributed")]


def test_few_layouts(tmp_path: Path) -> None:
    assert reshape([Layout(tp=2), *LAYOUTS[1:4:2]], KINDS[:1], tmp_path) == 9


@slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_pair_of_layouts(kind: Kind, tmp_path: Path) -> None:
    assert reshape(LAYOUTS, [kind], tmp_path) == 49


def save_with_torchs(layout: Layout, folder: Path) -> None:
    training = TorchTraining(layout, KINDS[0], "adamw")
    for number in range(2):
        training.step(number)
    dora_fx.save_checkpoint(training.chunks, folder / str(layout), training.optimizer)


def load_with_torchs(layout: Layout, folder: Path) -> None:
    training = TorchTraining(layout, KINDS[0], "adamw", " of another run")
    dora_fx.load_checkpoint(training.chunks, folder / str(LAYOUTS[1]), training.optimizer)
    dora_fx.save_checkpoint(training.chunks, folder / f"again {layout}", training.optimizer)


@slow
def test_state_of_torchs_optimizers(tmp_path: Path) -> None:
    others = [LAYOUTS[3], Layout(tp=2)]
    visit_worlds([(save_with_torchs, LAYOUTS[1]), *((load_with_torchs, layout) for layout in others)], tmp_path)
    for layout in others:
        assert_same_checkpoint(tmp_path / f"again {layout}", tmp_path / str(LAYOUTS[1]))


# Experts' layers and how many of them the model has.
ALONE = {"local_experts": LAYERS * 2 * EXPERTS, "shared_experts": LAYERS * 2}


def experts_alone(layout: Layout, folder: Path, kind: Kind) -> None:
    """Load what was saved after one step into a run that went on; the next step is then that of one that did not."""
    for name in ALONE:
        training, other = (Training(layout, kind, targets=[f"*.{name}.*"]) for _ in range(2))
        for each in (training, other):
            each.step(0)
        saved = values_of(training)
        assert saved and all(f".{name}." in key for key in saved)
        dora_fx.save_checkpoint(training.chunks, folder / name, training.optimizer)
        training.step(1)
        assert not any(torch.equal(value, saved[key]) for key, value in values_of(training).items())
        dora_fx.load_checkpoint(training.chunks, folder / name, training.optimizer)
        torch.testing.assert_close(values_of(training), saved, rtol=0, atol=0)
        for each in (training, other):
            each.step(2)
        torch.testing.assert_close(values_of(training), values_of(other), rtol=0, atol=0)


def values_of(training: Training) -> dict[str, torch.Tensor]:
    """What is trained on this rank, by names in the whole model."""
    return {name: parameter.detach().clone() for name, parameter, _ in trained_parameters(training.chunks)}


@pytest.mark.parametrize(
    "kind", [KINDS[2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2])], ids=str
)
def test_adapters_of_experts_alone(kind: Kind, tmp_path: Path) -> None:
    visit_worlds([(experts_alone, LAYOUTS[1])], tmp_path, kind)
    for name, number in ALONE.items():
        paths = read_adapters(tmp_path / name)
        assert len(paths) == number and all(f".{name}." in path for path in paths), list(paths)


SOME = ["*.local_experts.1-2.*", "linear_proj"]


def save_some(layout: Layout, folder: Path) -> None:
    training = Training(layout, KINDS[0], targets=SOME)
    training.step(0)
    dora_fx.save_checkpoint(training.chunks, folder / "some", training.optimizer)
    everything = Training(layout, KINDS[0])
    dora_fx.save_checkpoint(everything.chunks, folder / "all")


def load_some(layout: Layout, folder: Path) -> None:
    training = Training(layout, KINDS[0], " of another run", targets=SOME)
    dora_fx.load_checkpoint(training.chunks, folder / "some", training.optimizer)
    dora_fx.save_checkpoint(training.chunks, folder / "again", training.optimizer)
    others: dict[str, tuple[Any, str]] = {
        "all": (
            SOME,
            r"experts\.experts\.linear_fc\d\.adapter\.\S+: found adapters that differ between layers or experts",
        ),
        "some": (
            ["*.local_experts.2-3.*", "linear_proj"],
            r"experts\.experts\.1\.linear_fc1, \S+\.1\.linear_fc2, which the model has not adapted",
        ),
    }
    for saved, (targets, message) in others.items():
        model = Training(layout, KINDS[0], targets=targets)
        before = [parameter.clone() for _, parameter, _ in trained_parameters(model.chunks)]
        with pytest.raises(dora_fx.CheckpointError, match=message):
            dora_fx.load_checkpoint(model.chunks, folder / saved)
        after = [parameter for _, parameter, _ in trained_parameters(model.chunks)]
        assert all(map(torch.equal, before, after))


def test_adapters_of_some_experts(tmp_path: Path) -> None:
    visit_worlds([(save_some, LAYOUTS[1]), (load_some, LAYOUTS[3])], tmp_path)
    assert_same_checkpoint(tmp_path / "again", tmp_path / "some")
    expected = expected_adapters(KINDS[0])
    found = read_adapters(tmp_path / "all")
    assert len(found) == LAYERS * (2 * EXPERTS + 4)
    for path, adapter in found.items():
        place = re.search(r"layers\.(\d+)\.(.*?)(?:local_experts\.(\d+)\.(.*))?$", path)
        assert place is not None
        name = place[2] + (f"experts.{place[4]}" if place[3] else "")
        numbers = (int(place[1]), int(place[3])) if place[3] else (int(place[1]),)
        for part, tensor in adapter.tensors.items():
            assert torch.equal(tensor, expected[f"decoder.layers.{name}.adapter.{part}"][numbers])
    assert {path.split(".")[6] for path in read_adapters(tmp_path / "some") if "experts" in path} == {"1", "2"}
