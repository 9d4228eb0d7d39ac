"""The adapters of a checkpoint, read by one process without a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx import CheckpointError
from dora_fx.checkpoint import read_adapters
from dora_fx.megatron.world import megatron_world
from tests.models import GPT_TARGETS, randomize_adapters, tiny_gpt

ALIKE = [dict(target_modules=[*GPT_TARGETS, "output_layer"], dim=4, alpha=8, dropout=0.1)]
UNLIKE = [
    dict(target_modules=["*.layers.0.*", "*.layers.11.mlp.*"], dim=4, alpha=8),
    dict(target_modules=["*.layers.2.*"], dim=6, alpha=3),
]


@pytest.fixture(scope="module", params=[ALIKE, UNLIKE], ids=["alike", "unlike"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model of twelve layers, so that numbers of two digits come, and its checkpoint."""
    path = tmp_path_factory.mktemp("plain") / "checkpoint"
    with megatron_world():
        model = tiny_gpt(num_layers=12)
        for settings in request.param:
            dora_fx.DoRA(**settings)(model)
        randomize_adapters(model, 1)
        dora_fx.save_checkpoint(model, path)
    return model, path


def test_every_layer_has_its_own_tensors_and_settings(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    sites = {path: module for path, module in model.named_modules() if isinstance(module, dora_fx.DoRALinear)}
    found = read_adapters(path)
    assert not torch.distributed.is_initialized()
    assert found.keys() == sites.keys()
    for layer, site in sites.items():
        expected = {name: parameter.detach() for name, parameter in site.adapter.named_parameters()}
        torch.testing.assert_close(found[layer].tensors, expected, rtol=0, atol=0)
        settings = found[layer].settings
        adapter = site.adapter
        assert (settings.dim, settings.alpha, settings.dropout) == (adapter.dim, adapter.alpha, adapter.dropout)


def test_a_damaged_file_is_named(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    path = shutil.copytree(saved[1], tmp_path / "checkpoint")
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: the file is damaged, its checksum does not match"):
        read_adapters(path)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: the file is missing"):
        read_adapters(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_adapters(tmp_path / "nothing")


def test_the_checkpoint_that_an_interrupted_save_was_replacing(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    shutil.copytree(saved[1], tmp_path / ".checkpoint.previous")
    assert read_adapters(tmp_path / "checkpoint").keys() == read_adapters(saved[1]).keys()
