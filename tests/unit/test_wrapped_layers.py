"""Layers that a model has by several names, wrapped and bare, and wrappers that keep copies or keys of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import dora_fx
from tests.models import randomize_adapters
from tests.unit.test_wrappers import assert_same, build, relative_error

pytestmark = pytest.mark.usefixtures("world")


class Twice(nn.Module):
    """Holds an encoder under its name and compiled, and one linear layer bare and checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"first": nn.Linear(8, 12)})
        self.compiled = torch.compile(self.encoder, backend="eager")
        self.head = nn.Linear(12, 4)
        self.again = checkpoint_wrapper(self.head)
        self.compiled_head = torch.compile(self.head, backend="eager")


def test_a_layer_with_several_names_is_adapted_once_and_everywhere() -> None:
    model, x = Twice(), torch.randn(5, 12)
    plain = model.compiled_head(x)
    dora = dora_fx.DoRA(["first", "head"], dim=2)
    dora(model)
    assert [site.path for site in dora.report.sites] == ["encoder.first", "head"]
    assert model.again._checkpoint_wrapped_module is model.head is model.compiled_head._orig_mod
    assert isinstance(model.encoder["first"], dora_fx.DoRALinear)
    randomize_adapters(model)
    adapted = model.head(x)
    assert relative_error(plain, adapted) > 0.2
    for layer in (model.again, model.compiled_head):
        torch.testing.assert_close(layer(x), adapted)
    dora_fx.merge(model)
    assert type(model.head) is nn.Linear
    assert model.again._checkpoint_wrapped_module is model.head is model.compiled_head._orig_mod
    torch.testing.assert_close(model.compiled_head(x), adapted)


def test_averaged_weights_are_merged_and_the_trained_model_is_not() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
    dora_fx.DoRA(["0"], dim=2)(model)
    averaged = AveragedModel(model)
    randomize_adapters(model)
    averaged.update_parameters(model)
    dora = dora_fx.DoRA(["0"], dim=2)
    dora(averaged)
    assert [site.path for site in dora.report.sites] == ["0"]
    dora_fx.merge(averaged)
    assert type(averaged.module[0]) is nn.Linear
    assert isinstance(model[0], dora_fx.DoRALinear)
    # The first update copies.
    torch.testing.assert_close(averaged(x), model(x))


def test_state_dicts_of_checkpointed_parts_are_those_of_the_bare_model() -> None:
    (bare, _), (model, _) = build("parts_checkpointed", bare=True), build("parts_checkpointed")
    randomize_adapters(bare)
    assert list(model.state_dict()) == list(bare.state_dict())
    model.load_state_dict(bare.state_dict())
    assert_same(model, bare)


def test_a_compiled_layer_stays_compiled() -> None:
    model = nn.ModuleDict({"linear": torch.compile(nn.Linear(8, 4), backend="dora_fx")})
    compiled_layer = model["linear"]
    dora_fx.DoRA(["linear"], dim=2)(model)
    assert model["linear"] is compiled_layer
    torch._dynamo.utils.counters.clear()
    compiled_layer(torch.randn(3, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
