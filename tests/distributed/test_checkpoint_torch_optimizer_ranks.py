"""Checkpoints with plain torch optimizers hold the same bits whatever the layout, and go on alike at another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.launch import run_ranks, visit_worlds
from tests.distributed.pipeline_gpt import (
    LAYERS,
    Kind,
    Layout,
    _own,
    attach,
    build_base,
    set_adapter_values,
    trained_parameters,
)
from tests.distributed.test_checkpoint_reshaping import assert_same_checkpoint, whole_tensors

# Learning rates are powers of two: PyTorch's vectors and the scalar loop after them round lr * gradient of bfloat16
# differently, and which elements that loop takes depends on the size of a shard (and of the processor's vectors).
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2**-7, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=2**-7, momentum=0.9),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=2**-7),
}
# Tensors of a parameter's shape that an optimizer keeps for each of 12 parameters of a layer.
KEPT = {"adamw": 2, "sgd": 1, "nadam": 2}
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2), Layout(dp=2)]
KINDS = [Kind(), Kind(gated=False, sequence_parallel=True), Kind(optimizer="bf16")]
FIRST_HALF = tuple(f"decoder.layers.{layer}." for layer in range(LAYERS // 2))


class Training:
    """A GPT and a torch optimizer; gradients depend on nothing but the parameter's name and the step.

    Magnitudes are a group of their own, and the lower half of the layers gets no gradient in the first step.
    """

    def __init__(self, layout: Layout, kind: Kind, optimizer: str, salt: str = "") -> None:
        self.layout = layout
        self.chunks = attach(build_base(layout, kind))
        set_adapter_values(self.chunks, layout, salt)
        named = [(name, parameter) for name, parameter, _ in trained_parameters(self.chunks)]
        groups = [
            {"params": [parameter for name, parameter in named if name.endswith("magnitude") == is_magnitude]}
            for is_magnitude in (False, True)
        ]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.optimizer.param_groups[1]["lr"] = 2**-10

    def step(self, number: int) -> None:
        for name, parameter, sharding in trained_parameters(self.chunks):
            gradient = _own(tuple(parameter.shape), sharding, f"{name} gradient {number}", 1.0)
            parameter.grad = None if number == 0 and name.startswith(FIRST_HALF) else gradient.to(parameter.dtype)
        self.optimizer.step()


def save(layout: Layout, folder: Path, *_: Any) -> None:
    for kind in KINDS:
        for name in OPTIMIZERS:
            training = Training(layout, kind, name)
            for number in range(2):
                training.step(number)
                after = folder / f"{kind} {name} {layout} after {number + 1}"
                dora_fx.save_checkpoint(training.chunks, after, training.optimizer, extra=number)


def go_on(layout: Layout, folder: Path, sources: list[Layout]) -> None:
    """Load what every layout saved after the first step, and take the second one here."""
    for kind in KINDS:
        for name in OPTIMIZERS:
            for source in sources:
                training = Training(layout, kind, name, salt=" of another run")
                training.step(5)
                path = folder / f"{kind} {name} {source} after 1"
                assert dora_fx.load_checkpoint(training.chunks, path, training.optimizer) == 0
                training.step(1)
                again = folder / f"{kind} {name} {source} to {layout}"
                dora_fx.save_checkpoint(training.chunks, again, training.optimizer, extra=1)


def reshape(layouts: list[Layout], folder: Path) -> int:
    visit_worlds([(visit, layout) for visit in (save, go_on) for layout in layouts], folder, layouts)
    compared = 0
    for kind in KINDS:
        for name in OPTIMIZERS:
            reference = folder / f"{kind} {name} {layouts[0]}"
            for number, layers in ((1, LAYERS // 2), (2, LAYERS)):
                state = [key for key in whole_tensors(Path(f"{reference} after {number}")) if key.startswith("optim")]
                assert len(state) == KEPT[name] * 12 * layers
            for source in layouts:
                for number in (1, 2):
                    path = folder / f"{kind} {name} {source} after {number}"
                    assert_same_checkpoint(path, Path(f"{reference} after {number}"))
                for target in layouts:
                    again = folder / f"{kind} {name} {source} to {target}"
                    assert_same_checkpoint(again, Path(f"{reference} after 2"))
                    compared += 1
    return compared


def test_one_two_and_half_of_the_layers(tmp_path: Path) -> None:
    assert reshape(LAYOUTS[:3], tmp_path) == 81


@pytest.mark.slow
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    assert reshape([*LAYOUTS, Layout(tp=2, pp=2), Layout(tp=4), Layout(tp=2, dp=2)], tmp_path) == 576


def ranks_that_differ(folder: Path) -> list[str]:
    """Save with optimizers that are not alike on the ranks; returns the messages, nothing may be written."""
    found = []

    def refuse(optimizer: Any, training: Training) -> None:
        with pytest.raises(CheckpointError) as raised:
            dora_fx.save_checkpoint(training.chunks, folder / "checkpoint", optimizer)
        found.append(str(raised.value))

    training = Training(Layout(tp=2), Kind(), "adamw")
    training.step(1)
    training.optimizer.param_groups[0]["lr"] = 0.1 * dist.get_rank()
    refuse(training.optimizer, training)
    training = Training(Layout(tp=2), Kind(), "adamw" if dist.get_rank() else "sgd")
    refuse(training.optimizer, training)
    training = Training(Layout(tp=2), Kind(), "adamw")
    for number in range(dist.get_rank() + 1):
        training.step(number + 1)
    refuse(training.optimizer, training)
    refuse(training.optimizer if dist.get_rank() else None, training)
    dist.barrier()
    assert not list(folder.iterdir())
    return found


def test_ranks_whose_optimizers_differ(tmp_path: Path) -> None:
    lr, kind, steps, missing = run_ranks(ranks_that_differ, 2, 2, tmp_path)
    assert "'lr': 0.1" in lr and "on rank 1 and" in lr and "expected the same class" in lr
    assert "AdamW" in kind and "SGD" in kind
    assert "found optimizer state" in steps and "expected the same numbers on every rank" in steps
    assert "found a torch optimizer on 1 of 2 ranks" in missing
