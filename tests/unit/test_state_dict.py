"""State dicts: the base's keys are what they were, the adapter's are named for it, everything goes round."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx import disable_adapter
from tests.closeness import assert_apart, assert_close, rounding
from tests.models import DIM, LinearZoo, adapt_zoo, logits_of, randomize_adapters, sites, tiny_gpt, token_ids, trainable
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"]
ADAPTER_KEYS = {"adapter.linear_in.weight", "adapter.linear_out.weight", "adapter.weight_magnitude"}


def adapted_gpt(seed: int, **kwargs: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = dora_fx.DoRA(TARGETS, dim=DIM)(tiny_gpt(**kwargs))
    randomize_adapters(model, seed)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}


@every_case("tied", [True, False], ids=["tied", "untied"])
@every_case("bias", [True, False], ids=["bias", "no_bias"])
def test_base_keys_do_not_change(tied: bool, bias: bool) -> None:
    model = tiny_gpt(tied=tied, add_bias_linear=bias)
    before, keys = tensors(model), set(model.state_dict())
    dora_fx.DoRA(TARGETS, dim=DIM)(model)
    new = {f"{path}.{key}" for path in sites(model) for key in ADAPTER_KEYS}
    assert set(model.state_dict()) - keys == new
    assert keys <= set(model.state_dict())
    after = tensors(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_keys_of_one_layer_without_prefix() -> None:
    zoo = adapt_zoo(LinearZoo(["linear_bias"]))
    assert set(zoo.linear_bias.state_dict()) == {"weight", "bias"} | ADAPTER_KEYS
    zoo.linear_bias.load_state_dict(zoo.linear_bias.state_dict())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_from_one_model_and_loaded_into_another(tied: bool) -> None:
    source, target = adapted_gpt(1, tied=tied), adapted_gpt(2, tied=tied)
    assert_apart(logits_of(target, token_ids()), logits_of(source, token_ids()))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(logits_of(target, token_ids()), logits_of(source, token_ids()))
    first, second = tensors(source), tensors(target)
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_loading_leaves_the_given_state_dict_alone() -> None:
    model = adapted_gpt(1)
    state = model.state_dict()
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys


def test_base_checkpoint_into_an_adapted_model() -> None:
    """The adapters keep their values, and their norms follow the new base weights."""
    torch.manual_seed(5)
    base, model = tiny_gpt(), adapted_gpt(6)
    expected = logits_of(base, token_ids())
    adapters = {name: parameter.clone() for name, parameter in trainable(model).items()}
    incompatible = model.load_state_dict(base.state_dict(), strict=False)
    assert set(incompatible.missing_keys) == set(adapters)
    assert not incompatible.unexpected_keys
    assert all(torch.equal(parameter, adapters[name]) for name, parameter in trainable(model).items())
    with disable_adapter(model):
        assert torch.equal(logits_of(model, token_ids()), expected)
    logits_of(model, token_ids())
    for site in sites(model).values():
        measured = site.base_weight.double().square().sum(1)
        assert_close(site.base_norm_sq, measured, rounding(torch.float32, site.base_weight.shape[1]))


def test_adapter_alone_into_an_adapted_model() -> None:
    source, target = adapted_gpt(1), adapted_gpt(1)
    randomize_adapters(target, seed=9)
    only = {key: value for key, value in source.state_dict().items() if ".adapter." in key}
    incompatible = target.load_state_dict(only, strict=False)
    assert not incompatible.unexpected_keys
    assert not [key for key in incompatible.missing_keys if "to_wrap" in key or "adapter" in key]
    assert torch.equal(logits_of(target, token_ids()), logits_of(source, token_ids()))


def test_missing_and_unexpected_keys_carry_the_users_names() -> None:
    zoo = adapt_zoo(LinearZoo(["row", "linear_bias"]))
    state = zoo.state_dict()
    del state["row.weight"], state["linear_bias.adapter.weight_magnitude"]
    state["linear_bias.scale"] = torch.ones(1)
    with pytest.raises(RuntimeError) as raised:
        zoo.load_state_dict(state)
    assert "to_wrap" not in str(raised.value)
    for name in ('"row.weight"', '"linear_bias.adapter.weight_magnitude"', '"linear_bias.scale"'):
        assert name in str(raised.value)


def test_wrong_shape_is_named() -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    state = zoo.state_dict()
    state["row.adapter.weight_magnitude"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"row\.adapter\.weight_magnitude.*\[3\]"):
        zoo.load_state_dict(state)


def test_assigned_parameters_are_used() -> None:
    source, target = (adapt_zoo(LinearZoo(["linear_bias"])) for _ in range(2))
    x = {"linear_bias": torch.randn(5, 24)}
    target.load_state_dict(source.state_dict(), assign=True)
    target.requires_grad_(False)
    assert torch.equal(target(x)["linear_bias"], source(x)["linear_bias"])
