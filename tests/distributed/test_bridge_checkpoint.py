"""Adapters that Megatron-Bridge saved on two tensor-parallel ranks, loaded on one and on two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.variants import HAS_BRIDGE
from dora_fx import load_bridge_checkpoint
from tests.adapter_shards import AdapterShards
from tests.distributed.bridge import (
    TP,
    Values,
    model_to_load_into,
    row_sites,
    save_by_hand,
    save_with_bridge,
)
from tests.distributed.launch import run_ranks
from tests.models import sites, tiny_gpt

WRITERS: dict[str, Callable[[Path], Values]] = {"by_hand": save_by_hand, "megatron_bridge": save_with_bridge}

# Its package asks for versions of other packages that these tests do not run with. What is saved by hand has the same
# keys, shapes and order of rows.
needs_bridge = pytest.mark.skipif(not HAS_BRIDGE, reason="megatron-bridge is not installed")


@pytest.fixture(scope="module", params=["by_hand", pytest.param("megatron_bridge", marks=needs_bridge)], name="saved")
def saved_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """The folder of a checkpoint, and the whole tensors of the ranks that saved it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "iter_0000001"
    folder.mkdir()
    return folder, run_ranks(WRITERS[request.param], TP, TP, folder)


def whole_tensors(model: torch.nn.Module) -> Values:
    shards = AdapterShards(model)
    return {name: shards.gather(name, parameter) for name, parameter in shards.parameters.items()}


def check_loaded(model: torch.nn.Module, expected: Values) -> list[str]:
    """Names of tensors that are not the saved ones; magnitudes of row layers are to be the norms."""
    wrong = [name for name, value in whole_tensors(model).items() if not torch.equal(value, expected[name])]
    rebuilt = [f"{path}.adapter.weight_magnitude" for path in row_sites(model)]
    for path in row_sites(model):
        site = sites(model)[path]
        assert torch.equal(site.adapter.weight_magnitude, site._get_weight_norm())
    assert set(rebuilt) <= set(wrong)
    return sorted(set(wrong) - set(rebuilt))


def load_on_ranks(folder: Path, expected: Values) -> list[str]:
    model = model_to_load_into()
    load_bridge_checkpoint(model, folder, tensor_parallel_size=TP, rebuild_row_magnitudes=True)
    return check_loaded(model, expected)


def test_one_rank_loads_what_two_saved(saved: tuple[Path, Values], world: None) -> None:
    folder, expected = saved
    model = model_to_load_into()
    load_bridge_checkpoint(model, folder, tensor_parallel_size=TP, rebuild_row_magnitudes=True)
    assert len(expected) == 24
    assert check_loaded(model, expected) == []


def test_two_ranks_load_what_two_saved(saved: tuple[Path, Values]) -> None:
    assert run_ranks(load_on_ranks, TP, TP, *saved) == []


def test_what_was_lost_or_does_not_fit_is_refused(saved: tuple[Path, Values], world: None, tmp_path: Path) -> None:
    folder, _ = saved

    def refuse(message: str, model: Any = None, path: Path = folder, **settings: Any) -> None:
        model = model if model is not None else model_to_load_into()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            load_bridge_checkpoint(model, path, **({"tensor_parallel_size": TP} | settings))
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    refuse(r"linear_proj \(4 such layers\): Megatron-Bridge saves the magnitude of a row layer from rank 0 alone")
    refuse("found .* saved by 2 tensor-parallel ranks in .*, expected 1, the size given", tensor_parallel_size=1)
    refuse(
        r"found \(2, 96\) for .*fc1.*weight_magnitude, expected \(2, 128\)",
        model_to_load_into(ffn_hidden_size=64),
    )
    refuse("found no adapted layer", tiny_gpt())
    refuse("found no .metadata, expected a torch_dist checkpoint", path=tmp_path)
