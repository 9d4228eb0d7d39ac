"""A checkpoint saved at one layout and loaded at another holds the same bits, optimizer state included."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load
from torch.utils import _pytree as pytree

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, Training, expected_adapters, linear_sizes

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=4),
    Layout(pp=4),
    Layout(tp=2, pp=2),
    Layout(tp=2, dp=2),
    Layout(pp=2, dp=2),
]
KINDS = [
    Kind(gated, sequence_parallel, optimizer)
    for optimizer, flags in (("fp32", (False, True)), ("bf16", (True,)), ("distributed", (True,)))
    for gated in (True, False)
    for sequence_parallel in flags
]
FEW_LAYOUTS, FEW_KINDS = LAYOUTS[1:4], [Kind(), Kind(sequence_parallel=True, optimizer="distributed")]


def save_untrained_and_trained(layout: Layout, kinds: list[Kind], folder: Path, _: list[Layout]) -> None:
    for kind in kinds:
        training = Training(layout, kind)
        dora_fx.save_checkpoint(training.chunks, folder / f"untrained {kind} {layout}")
        for number in range(2):
            training.step(number)
        extra = {"step": 2, "order": torch.arange(5)}
        dora_fx.save_checkpoint(training.chunks, folder / f"{kind} {layout}", training.optimizer, extra=extra)


def load_all_and_save_again(layout: Layout, kinds: list[Kind], folder: Path, sources: list[Layout]) -> None:
    for kind in kinds:
        # Of other values, and without optimizer state for the first load.
        training = Training(layout, kind, salt=" of another run")
        for source in sources:
            extra = dora_fx.load_checkpoint(training.chunks, folder / f"{kind} {source}", training.optimizer)
            assert extra["step"] == 2
            again = folder / f"{kind} {source} to {layout}"
            dora_fx.save_checkpoint(training.chunks, again, training.optimizer, extra=extra)
            training.step(7)


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by key, read by torch alone."""
    reader = FileSystemReader(checkpoint)
    tensors: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def rest_of(checkpoint: Path) -> dict[str, Any]:
    """What is not sharded, with numbers and lists in place of tensors."""
    common: dict[str, Any] = torch.load(checkpoint / "common.pt", weights_only=True)
    return pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, common)


def settings_of(rest: dict[str, Any]) -> dict[str, Any]:
    """The rest of a checkpoint, with Megatron's optimizers in whatever chain as sets of what they have.

    It chains one for experts to that of the dense layers where their gradients are reduced over other ranks.
    """
    if "optimizer" not in rest:
        return rest
    chain = list(rest["optimizer"].values()) if 0 in rest["optimizer"] else [rest["optimizer"]]
    parts: dict[str, set[str]] = {}
    for single in chain:
        of_torch = single.get("optimizer", single)
        for group in of_torch.pop("param_groups"):
            parts.setdefault("groups", set()).add(repr(group | {"is_expert_parallel": False}))
        parts.setdefault("others", set()).add(repr(single))
    return {**rest, "optimizer": parts}


@functools.lru_cache(maxsize=2)
def _reference(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The contents of a checkpoint with which many are compared, and into which nothing writes any more."""
    return whole_tensors(checkpoint), settings_of(rest_of(checkpoint))


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    tensors, (wanted, rest) = whole_tensors(found), _reference(expected)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor), key
    assert settings_of(rest_of(found)) == rest


def reshape(layouts: list[Layout], kinds: list[Kind], folder: Path) -> int:
    """Save at every layout, load at every layout, compare; returns the number of ordered pairs and kinds."""
    visits = [(step, layout) for step in (save_untrained_and_trained, load_all_and_save_again) for layout in layouts]
    visit_worlds(visits, kinds, folder, layouts)
    for kind in kinds:
        reference = folder / f"{kind} {layouts[0]}"
        moments = [key for key in whole_tensors(reference) if key.startswith("optimizer.state.exp_avg.")]
        assert len(moments) == 3 * len(linear_sizes(kind))
        for source in layouts:
            untrained = whole_tensors(folder / f"untrained {kind} {source}")
            torch.testing.assert_close(untrained, expected_adapters(kind), rtol=0, atol=0)
            assert_same_checkpoint(folder / f"{kind} {source}", reference)
            for target in layouts:
                assert_same_checkpoint(folder / f"{kind} {source} to {target}", reference)
    return len(layouts) ** 2 * len(kinds)


def test_few_layouts(tmp_path: Path) -> None:
    assert reshape(FEW_LAYOUTS, FEW_KINDS, tmp_path) == 18


@pytest.mark.slow
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    assert reshape(LAYOUTS, KINDS, tmp_path) == 800
