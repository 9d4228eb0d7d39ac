"""Adapters that train in turns on one base end where each ends alone, at every layout and with Megatron's wrapper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx import DoRA
from dora_fx.cache import CachedSite, check, refresh
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import (
    LAYERS,
    TARGETS,
    Kind,
    Layout,
    Training,
    build_base,
    set_adapter_values,
    trained_parameters,
)
from tests.distributed.test_checkpoint_reshaping import assert_same_checkpoint
from tests.distributed.zoo import sites_of

MLP = ["linear_fc1", "linear_fc2"]
ADAPTERS = {"policy": dict(targets=TARGETS, dim=4), "reward": dict(targets=MLP, dim=8)}
LAYOUTS = [Layout(tp=2), Layout(pp=2, vpp=2), Layout(dp=2)]


def train_in_turns(layout: Layout, folder: Path, kind: Kind) -> None:
    chunks = build_base(layout, kind)
    together = {}
    # Some chunks and stages have no layer of the first one, and know its name nevertheless.
    dora_fx.add_adapter(chunks, "first layer", DoRA(["*.layers.0.mlp.linear_fc1"], dim=4))
    dora_fx.add_adapter(chunks, "last layer", DoRA([f"*.layers.{LAYERS - 1}.mlp.linear_fc2"], dim=4))
    for name in ("last layer", "first layer"):
        dora_fx.set_adapter(chunks, name)
        assert dora_fx.adapter_names(chunks)[0] == name
    for name, settings in ADAPTERS.items():
        dora_fx.add_adapter(chunks, name, DoRA(settings["targets"], dim=settings["dim"], alpha=8))
    dora_fx.set_adapter(chunks, "policy")
    for name in ("first layer", "last layer"):
        dora_fx.delete_adapter(chunks, name)
    for name in ADAPTERS:
        with dora_fx.adapter(chunks, name):
            set_adapter_values(chunks, layout, name)
            together[name] = Training(layout, kind, chunks=chunks)
    alone = {name: Training(layout, kind, name, **settings) for name, settings in ADAPTERS.items()}
    for number in range(2):
        for name, training in together.items():
            dora_fx.set_adapter(training.chunks, name)
            assert training.train(number) == alone[name].train(number)
    for name, training in together.items():
        with dora_fx.adapter(chunks, name):
            found, expected = (trained_parameters(one.chunks) for one in (training, alone[name]))
            for (path, value, _), (_, wanted, _) in zip(found, expected, strict=True):
                assert torch.equal(value, wanted), path
            dora_fx.save_checkpoint(training.chunks, folder / f"{name} together {layout}", training.optimizer)
        dora_fx.save_checkpoint(alone[name].chunks, folder / f"{name} alone {layout}", alone[name].optimizer)
    for name, other in (("policy", "reward"), ("reward", "policy")):
        check_freshness(chunks, together[name], name, other)
    if layout.pp == 1:
        refuse_other_wrappers(chunks, together)


def check_freshness(bare: list[nn.Module], training: Training, name: str, other: str) -> None:
    """A step of one adapter makes its own norms stale on every rank, and leaves those of the other up to date."""
    written = {}
    for each in (name, other):
        with dora_fx.adapter(bare, each):
            written[each] = refreshed(bare)
    dora_fx.set_adapter(training.chunks, name)
    training.train(9)
    with dora_fx.adapter(bare, other):
        assert refreshed(bare) == written[other]
        check(cached_sites(bare))
    # The call of the step's last micro-batch read what was computed before its first.
    assert refreshed(bare) == [version + 1 for version in written[name]]
    check(cached_sites(bare))


def cached_sites(chunks: list[nn.Module]) -> list[CachedSite]:
    return [site.cached_site() for chunk in chunks for site in sites_of(chunk).values()]


def refreshed(chunks: list[nn.Module]) -> list[int]:
    """Bring the active adapter's norms up to date, and return how often each was written."""
    refresh(cached_sites(chunks))
    return [site.cached.delta._version for site in cached_sites(chunks)]


def refuse_other_wrappers(bare: list[nn.Module], together: dict[str, Training]) -> None:
    for active, other in (("reward", "policy"), ("policy", "reward")):
        dora_fx.set_adapter(bare, active)
        with pytest.raises(ValueError, match=f"adapter '{active}': found DistributedDataParallel made for another"):
            together[other].train(0)
    with pytest.raises(ValueError, match="adapter 'more': found DistributedDataParallel around the model"):
        dora_fx.add_adapter(bare, "more", DoRA(MLP))
    assert dora_fx.adapter_names(bare) == tuple(ADAPTERS)


@pytest.mark.parametrize("kind", [Kind(sequence_parallel=True), Kind(optimizer="distributed")], ids=str)
def test_in_turns_and_alone(kind: Kind, tmp_path: Path) -> None:
    visit_worlds([(train_in_turns, layout) for layout in LAYOUTS], tmp_path, kind)
    for layout in LAYOUTS:
        for name in ADAPTERS:
            assert_same_checkpoint(tmp_path / f"{name} together {layout}", tmp_path / f"{name} alone {layout}")
