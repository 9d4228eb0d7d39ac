"""Every public function takes a model, a list and a tuple of chunks, bare and wrapped; what is neither is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import dora_fx
from dora_fx import CheckpointError
from tests.distributed.bridge import adapter_shards, saving_on_cpu
from tests.models import DIM, randomize_adapters, sites, tiny_gpt
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: model,
    "list": lambda model: [model],
    "tuple": lambda model: (model,),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "list_compiled": lambda model: [torch.compile(model, backend="eager")],
    "tuple_compiled": lambda model: (torch.compile(model, backend="eager"),),
}


def attach(model: Any) -> Any:
    torch.manual_seed(0)
    return dora_fx.DoRA(["linear_qkv", "linear_fc1"], dim=DIM)(model)


def adapted(seed: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = attach(tiny_gpt(num_layers=1))
    randomize_adapters(model, seed)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    # Megatron's layers have entries that are None.
    return {name: value.detach().clone() for name, value in model.state_dict().items() if value is not None}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(values(found), values(expected), rtol=0, atol=0)


LAYER = nn.Linear(2, 2)

form = every_case("form", FORMS.values(), ids=FORMS)


@form
def test_attach_merge_and_unmerge(form: Callable[[nn.Module], Any]) -> None:
    model = tiny_gpt(num_layers=1)
    given = form(model)
    assert attach(given) is given
    assert len(sites(model)) == 2
    randomize_adapters(model)
    before = values(model)
    assert dora_fx.merge(given, keep_adapter=True) is given
    assert not sites(model)
    assert dora_fx.unmerge(given) is given
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)


@form
def test_switch_off_and_invalidate(form: Callable[[nn.Module], Any]) -> None:
    model = adapted()
    x = torch.randn(3, 1, 32)
    layer = model.decoder.layers[0].mlp.linear_fc1
    on, _ = layer(x)
    with dora_fx.disable_adapter(form(model)):
        off, _ = layer(x)
    assert torch.equal(off, layer.to_wrap(x)[0])
    assert not torch.allclose(on, off)
    doubled = layer.base_norm_sq.clone() * 4
    layer.weight.data.mul_(2)
    dora_fx.invalidate_norms(form(model))
    layer(x)
    torch.testing.assert_close(layer.base_norm_sq, doubled)


@form
def test_save_and_load(form: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model, other = adapted(), adapted(seed=2)
    dora_fx.save_checkpoint(form(model), tmp_path / "checkpoint", extra=7)
    assert dora_fx.load_checkpoint(form(other), tmp_path / "checkpoint") == 7
    assert_same(other, model)


@form
def test_export_and_import(form: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model, other, bare = adapted(), adapted(seed=2), tiny_gpt(num_layers=1)
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if ".adapter." not in name})
    dora_fx.export_hf(form(model), tmp_path / "adapter")
    for target in (other, bare):
        given = form(target)
        assert dora_fx.import_hf(given, tmp_path / "adapter") is given
        assert_same(target, model)


@form
def test_load_from_bridge(form: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model, other = adapted(), adapted(seed=2)
    (tmp_path / "bridge").mkdir()
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(model), str(tmp_path / "bridge"))
    given = form(other)
    assert dora_fx.load_bridge_checkpoint(given, tmp_path / "bridge", tensor_parallel_size=1) is given
    assert_same(other, model)


def calls(folder: Path) -> dict[str, Callable[[Any], Any]]:
    """Every public function of a model."""
    return {
        "DoRA": dora_fx.DoRA(["linear_qkv"], dim=DIM),
        "add_adapter": lambda model: dora_fx.add_adapter(model, "second", dora_fx.DoRA(["linear_qkv"], dim=DIM)),
        "set_adapter": lambda model: dora_fx.set_adapter(model, "second"),
        "adapter": lambda model: dora_fx.adapter(model, "second").__enter__(),
        "mixed": lambda model: dora_fx.mixed(model, ["default"]).__enter__(),
        "delete_adapter": lambda model: dora_fx.delete_adapter(model, "second"),
        "active_adapter": dora_fx.active_adapter,
        "adapter_names": dora_fx.adapter_names,
        "merge": dora_fx.merge,
        "unmerge": dora_fx.unmerge,
        "disable_adapter": lambda model: dora_fx.disable_adapter(model).__enter__(),
        "invalidate_norms": dora_fx.invalidate_norms,
        "compile_model": dora_fx.compile_model,
        "save_checkpoint": lambda model: dora_fx.save_checkpoint(model, folder / "checkpoint"),
        "load_checkpoint": lambda model: dora_fx.load_checkpoint(model, folder / "checkpoint"),
        "merged": lambda model: dora_fx.merged(model).__enter__(),
        "iter_adapter": dora_fx.iter_adapter,
        "iter_merged": dora_fx.iter_merged,
        "compare_merged": dora_fx.compare_merged,
        "parameter_groups": lambda model: dora_fx.parameter_groups(model, lr=1e-3),
        "export_hf": lambda model: dora_fx.export_hf(model, folder / "adapter"),
        "import_hf": lambda model: dora_fx.import_hf(model, folder / "adapter"),
        "check": lambda model: dora_fx.check(model, {}),
        "load_bridge_checkpoint": lambda model: dora_fx.load_bridge_checkpoint(
            model, folder / "bridge", tensor_parallel_size=1
        ),
    }


def test_these_are_all_public_functions(tmp_path: Path) -> None:
    no_functions_of_a_model = {
        *("CheckError", "CheckReport", "CheckpointError", "DoRALinear", "ParallelLinearDoRAAdapter"),
        *("config_overrides", "explain", "__version__"),
    }
    assert set(dora_fx.__all__) - no_functions_of_a_model == set(calls(tmp_path))


@every_case("name", calls(Path()))
@every_case(
    ("given", "error", "message"),
    [
        (None, TypeError, "found NoneType, expected a torch.nn.Module, or a list or a tuple of model chunks"),
        ({"model": 1}, TypeError, "found dict, expected"),
        ("model", TypeError, r"found \['str', .*\], expected a torch.nn.Module"),
        ([nn.Linear(2, 2), 3], TypeError, r"found \['Linear', 'int'\], expected"),
        (iter([]), TypeError, "found list_iterator, expected"),
        ([], ValueError, "found no chunk, expected a model or at least one of its chunks"),
        ((), ValueError, "found no chunk, expected a model or at least one of its chunks"),
        ([LAYER, nn.Linear(2, 2), torch.compile(LAYER)], ValueError, "found the same chunk twice"),
    ],
    ids=["none", "dict", "text", "number", "iterator", "no_chunk", "no_chunks", "twice"],
)
def test_what_is_no_model(name: str, given: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        calls(tmp_path)[name](given)
    assert not list(tmp_path.iterdir())


@every_case("name", calls(Path()))
def test_fully_sharded_data_parallel(name: str, tmp_path: Path) -> None:
    sharded = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"^model: found .*FullyShardedDataParallel, which replaces the layers' weights"
    ):
        calls(tmp_path)[name]([sharded])
    with pytest.raises(ValueError, match=r"^inner\.0: found .*FullyShardedDataParallel"):
        calls(tmp_path)[name](nn.ModuleDict({"inner": nn.Sequential(sharded)}))
    assert not list(tmp_path.iterdir())


@every_case("name", ["DoRA", "merge", "save_checkpoint", "export_hf", "import_hf", "load_bridge_checkpoint"])
def test_weights_that_fully_shard_took_apart(name: str, tmp_path: Path) -> None:
    """`fully_shard` may go around an adapted model; what reads whole weights says where it meets its pieces."""
    dora_fx.export_hf(adapted(), tmp_path / "adapter")
    (tmp_path / "bridge").mkdir()
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(adapted()), str(tmp_path / "bridge"))
    model = tiny_gpt(num_layers=1) if name == "DoRA" else adapted()
    fully_shard(model.decoder.layers[0], mesh=init_device_mesh("cpu", (1,)))
    folder = tmp_path / "new" if name == "export_hf" else tmp_path
    with pytest.raises(
        (ValueError, CheckpointError), match=r"layers\.0\..*linear_\w+\..*: found a DTensor with placements"
    ):
        calls(folder)[name](model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "bridge"]
