"""HybridModel with Megatron's shipped spec and emulated kernels: layer numbers, stages, training, and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_fx.app.cli.main import main
from dora_fx.checkpoint import read_adapters
from tests.closeness import assert_close, rounding
from tests.distributed.hybrid_models import load_stages, save_stages, train_in_every_spec
from tests.distributed.launch import run_ranks, visit_worlds
from tests.distributed.pipeline_gpt import Layout
from tests.distributed.spec_models import PADDED
from tests.finetune_runs import ROUNDINGS_OF_A_STEP
from tests.hf_models import save_tiny_checkpoint
from tests.unit.test_specs import needs_hybrid_model

pytestmark = [pytest.mark.usefixtures("emulated_te"), needs_hybrid_model]


def test_stages_number_name_and_save_their_layers_as_one_emulated_kernels(tmp_path: Path) -> None:
    one, two = Layout(), Layout(pp=2)
    visit_worlds([(save_one, one), (save_two, two), (load_two, two)], tmp_path)
    expected, found = (torch.load(tmp_path / f"pp{layout.pp} found") for layout in (one, two))
    assert sorted(found["paths"]) == sorted(expected["paths"])
    assert "decoder.layers.3.mlp.linear_fc2" in found["paths"]
    for name in ("logits", "adapter", "merged"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    torch.testing.assert_close(torch.load(tmp_path / "pp2 loaded"), expected["adapter"], rtol=0, atol=0)
    saved, again = (read_adapters(tmp_path / f"pp{layout.pp}") for layout in (one, two))
    assert saved.keys() == again.keys()


def save_one(layout: Layout, folder: Path) -> None:
    save_stages(layout, "*-*-", folder)


def save_two(layout: Layout, folder: Path) -> None:
    save_stages(layout, "*-|*-", folder)


def load_two(layout: Layout, folder: Path) -> None:
    load_stages(layout, "*-|*-", folder)


def test_training_goes_through_the_losses_of_the_local_spec_emulated_kernels(tmp_path: Path, capsys) -> None:
    found = run_ranks(train_in_every_spec, 1, 1, ["local", "te", "hybrid", "hybrid recomputed"], str(tmp_path))
    bound = rounding(torch.float32, 5 * ROUNDINGS_OF_A_STEP)
    expected = found.pop("local")
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    for own in found.values():
        for name in ("losses", "logits"):
            assert_close(own[name], expected[name], bound)
    torch.testing.assert_close(found["hybrid recomputed"], found["hybrid"], rtol=0, atol=0)
    base = save_tiny_checkpoint(tmp_path / "base", "qwen2", **PADDED)
    for command in ("export", "merge"):
        assert main([command, str(tmp_path / "hybrid"), "--base", str(base), "--to", str(tmp_path / command)]) == 0
    assert main(["inspect", str(tmp_path / "hybrid")]) == 0
    assert "HybridModel" in capsys.readouterr().out
    files = load_file(tmp_path / "export" / "adapter_model.safetensors")
    torch.testing.assert_close(files, found["hybrid"]["adapter"], rtol=0, atol=0)
