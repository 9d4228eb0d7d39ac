"""A base that is padded for one number of ranks and not for another shares its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

import dora_fx
from dora_fx.checkpoint import read_adapters
from dora_fx.checkpoint.manifest import read_manifest
from dora_fx.models import build_gpt_model
from tests.adapter_shards import AdapterShards
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import TARGETS, Layout
from tests.distributed.zoo import whole_values
from tests.hf_models import tiny_hf_model

ONE, TWO = Layout(), Layout(tp=2)


def build(salt: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model with three query groups, which two ranks pad to four, and the whole tensors of its adapters."""
    hf = tiny_hf_model("llama", num_key_value_heads=3)
    model = dora_fx.DoRA(TARGETS, dim=4, alpha=8)(build_gpt_model(hf.config, hf.state_dict()))
    shards, wholes = AdapterShards(model), {}
    with torch.no_grad():
        for name, parameter in shards.parameters.items():
            wholes[name] = whole_values(tuple(shards.gather(name, parameter).shape), f"{name}{salt}", 1.0).float()
            parameter.copy_(own_part(model, name, wholes[name]))
    return model, wholes


def own_part(model: torch.nn.Module, name: str, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, with zeros for the padding."""
    path, _, own_name = name.partition(".adapter.")
    adapter = model.get_submodule(path).adapter
    return adapter.placements[own_name].pad_and_shard(whole, adapter.tp_rank, adapter.tp_size)


def optimizer_of(
    model: torch.nn.Module, wholes: dict[str, torch.Tensor], salt: str
) -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """An optimizer in the middle of training, and the whole first moments of its parameters."""
    parameters = AdapterShards(model).parameters
    optimizer = torch.optim.AdamW(parameters.values())
    moments = {
        name: whole_values(tuple(wholes[name].shape), f"{name} moment{salt}", 1.0).float() for name in parameters
    }
    for name, parameter in parameters.items():
        own = own_part(model, name, moments[name])
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": own, "exp_avg_sq": own.square()}
    return optimizer, moments


def save(layout: Layout, folder: Path) -> None:
    model, wholes = build(" of this run")
    dora_fx.save_checkpoint(model, folder / str(layout), optimizer_of(model, wholes, " of this run")[0])


def load(layout: Layout, folder: Path) -> None:
    base, expected = build(" of this run")
    _, moments = optimizer_of(base, expected, " of this run")
    for source in (ONE, TWO):
        model, wholes = build(" of another run")
        optimizer, _ = optimizer_of(model, wholes, " of another run")
        dora_fx.load_checkpoint(model, folder / str(source), optimizer)
        shards = AdapterShards(model)
        for name, parameter in shards.parameters.items():
            state = optimizer.state[parameter]
            assert torch.equal(state["exp_avg"], own_part(model, name, moments[name])), f"{name}: moment"
            assert torch.equal(state["exp_avg_sq"], state["exp_avg"].square())
            assert state["step"] == 3
        for name, parameter in shards.parameters.items():
            assert torch.equal(shards.gather(name, parameter), expected[name]), name
            own = own_part(model, name, expected[name])
            assert torch.equal(parameter, own), f"{name}: padding"
        layers = read_adapters(folder / str(source))
        plain = {f"{path}.adapter.{name}": t for path, layer in layers.items() for name, t in layer.tensors.items()}
        torch.testing.assert_close(plain, expected, rtol=0, atol=0)


def test_one_rank_and_two(tmp_path: Path) -> None:
    visit_worlds([(step, layout) for step in (save, load) for layout in (ONE, TWO)], tmp_path)
    one, two = (read_manifest(tmp_path / str(layout)) for layout in (ONE, TWO))
    assert one.tensors == two.tensors
    assert one.base == two.base
