"""Several adapters on one base: each computes and trains as if it were alone."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx import DoRA
from tests.hf_models import tiny_hf_model
from tests.models import GPT_TARGETS, logits_of, randomize_adapters, sites, tiny_gpt, token_ids, trainable
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

MLP = ["linear_fc1", "linear_fc2"]
# The second has other targets, the third another rank and alpha, the fourth is like the first.
SETTINGS: dict[str, dict[str, Any]] = {
    "first": dict(target_modules=GPT_TARGETS, dim=6, alpha=12),
    "mlp": dict(target_modules=MLP, dim=6, alpha=12),
    "wide": dict(target_modules=GPT_TARGETS, dim=8, alpha=4),
    "like first": dict(target_modules=GPT_TARGETS, dim=6, alpha=24),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_gpt().double()


def attach_one(model: nn.Module, name: str, attach: Callable[[DoRA], Any]) -> None:
    torch.manual_seed(10)
    attach(DoRA(**SETTINGS[name]))
    randomize_adapters(model, seed=list(SETTINGS).index(name))


def add_and_set(model: nn.Module, name: str, dora: DoRA) -> None:
    dora_fx.add_adapter(model, name, dora)
    dora_fx.set_adapter(model, name)


def with_all() -> nn.Module:
    model = base()
    for name in SETTINGS:
        attach_one(model, name, functools.partial(add_and_set, model, name))
    return dora_fx.set_adapter(model, "first")


def alone(name: str) -> nn.Module:
    model = base()
    attach_one(model, name, lambda dora: dora(model))
    return model


def outcome(model: nn.Module, call: Callable[..., Any] | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = logits_of(model if call is None else call, token_ids())
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in trainable(model).items()}}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_each_computes_what_it_does_alone() -> None:
    model = with_all()
    assert dora_fx.adapter_names(model)[0] == dora_fx.active_adapter(model) == "first"
    expected = {name: outcome(alone(name)) for name in SETTINGS}
    for _ in range(2):
        for name in SETTINGS:
            with dora_fx.adapter(model, name):
                assert_same(outcome(model), expected[name])
                assert model.state_dict().keys() == alone(name).state_dict().keys()
    assert dora_fx.active_adapter(model) == "first"


def test_adapters_of_one_kind_share_a_compiled_graph() -> None:
    model = with_all()
    # The first call allocates a buffer of Megatron's, which Dynamo guards on.
    outcome(model)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="dora_fx", fullgraph=True, options={"inner_compiler": "aot_eager"})
    for name in [*SETTINGS, *SETTINGS]:
        dora_fx.set_adapter(compiled, name)
        assert_same(outcome(model, compiled), outcome(model))
    # "like first" has the graph of "first".
    assert counters["dora_fx"]["graphs_compiled"] == len(SETTINGS) - 1


def train(models: dict[str, nn.Module], enter: Callable[[str], Any]) -> None:
    optimizers = {}
    for name, model in models.items():
        enter(name)
        optimizers[name] = torch.optim.AdamW(dora_fx.parameter_groups(model), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        for name, model in models.items():
            enter(name)
            logits_of(model, token_ids(seed=step)).square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()


def test_training_in_turns_is_training_alone(tmp_path: Path) -> None:
    model = with_all()
    names = ["first", "mlp", "wide"]
    train(dict.fromkeys(names, model), lambda name: dora_fx.set_adapter(model, name))
    twins = {name: alone(name) for name in names}
    train(twins, lambda name: None)
    for name, twin in twins.items():
        with dora_fx.adapter(model, name):
            assert_same(outcome(model), outcome(twin))
            dora_fx.save_checkpoint(model, tmp_path / name)
        dora_fx.load_checkpoint(fresh := alone(name), tmp_path / name)
        assert_same(outcome(fresh), outcome(twin))
    with dora_fx.adapter(model, "like first"):
        assert_same(outcome(model), outcome(alone("like first")))


def norms_written(model: nn.Module, name: str) -> int:
    """How often the norms of an adapter's first layer were written, after a call."""
    with dora_fx.adapter(model, name):
        outcome(model)
        return next(iter(sites(model).values())).cached_delta._version


def test_a_step_leaves_the_norms_of_others_up_to_date() -> None:
    model, other = with_all(), nn.Parameter(torch.ones(2))
    parameters = {}
    for name in SETTINGS:
        with dora_fx.adapter(model, name):
            parameters[name] = list(trainable(model).values())

    def stale_after(stepped: list[nn.Parameter]) -> list[str]:
        before = {name: norms_written(model, name) for name in SETTINGS}
        for parameter in stepped:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(stepped, lr=1e-3).step()
        after = {name: norms_written(model, name) for name in SETTINGS}
        return [name for name in SETTINGS if after[name] > before[name]]

    for name in SETTINGS:
        assert stale_after(parameters[name]) == [name]
    assert stale_after(parameters["mlp"] + parameters["wide"][:1]) == ["mlp", "wide"]
    # It may be a copy, which somebody writes into the adapters.
    assert stale_after([*parameters["mlp"], other]) == list(SETTINGS)
    # After a load that puts new parameters in the place of the old ones.
    dora_fx.set_adapter(model, "wide")
    values = {key: value.clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    model.load_state_dict(values, strict=False, assign=True)
    parameters["wide"] = list(trainable(model).values())
    assert stale_after(parameters["wide"]) == ["wide"] and stale_after(parameters["first"]) == ["first"]
    mlp = norms_written(model, "mlp")
    with torch.no_grad():
        # Past the version counter, as by something that a step does beside its own parameters.
        parameters["mlp"][0].data.mul_(2.0)
    before = norms_written(model, "first")
    assert norms_written(model, "mlp") > mlp
    assert norms_written(model, "first") == before


@every_case("active", ["like first", "mlp"])
@every_case("is_compiled", [False, True])
@every_case("use_reentrant", [False, True])
def test_a_change_before_the_backward_pass_of_a_checkpoint(active: str, is_compiled: bool, use_reentrant: bool) -> None:
    model = with_all()
    layers = model.decoder.layers
    called: Callable[..., Any] = layers[0]
    if is_compiled:
        called = torch.compile(layers[0], backend="dora_fx", options={"inner_compiler": "aot_eager"})
    x = torch.randn(12, 2, 32, dtype=torch.float64, requires_grad=True)
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]

    def loss() -> torch.Tensor:
        run = lambda hidden: called(hidden, attention_mask=future)[0]  # noqa: E731
        return checkpoint(run, x, use_reentrant=use_reentrant).square().mean()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        x.grad = None
        value.backward()
        return x.grad

    expected = gradient(loss()).clone()
    first = loss()
    dora_fx.set_adapter(model, active)
    gradient(loss())
    with pytest.raises(RuntimeError, match=f"found adapter '{active}' active where the backward pass repeats"):
        gradient(first)
    second = loss()
    dora_fx.set_adapter(model, "first")
    first = loss()
    dora_fx.set_adapter(model, active)
    gradient(second)
    dora_fx.set_adapter(model, "first")
    assert torch.equal(gradient(first), expected)


def test_copies_and_pickles_have_all_of_them() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    x, expected = torch.randn(5, 6, dtype=torch.float64), {}
    for seed, (name, targets) in enumerate({"both": ["0", "1"], "last": ["1"]}.items()):
        add_and_set(model, name, DoRA(targets, dim=2))
        randomize_adapters(model, seed)
        expected[name] = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in expected:
            assert torch.equal(dora_fx.set_adapter(twin, name)(x), expected[name])
            with torch.no_grad():
                trainable(twin)["1.adapter.weight_magnitude"].zero_()
    for name in expected:
        assert torch.equal(dora_fx.set_adapter(model, name)(x), expected[name])


def test_inactive_adapters_follow_casts_and_modes_of_the_base() -> None:
    model = with_all().float().eval()
    expected = alone("wide").float().eval()
    assert_same(outcome(dora_fx.set_adapter(model, "wide")), outcome(expected))
    assert not any(module.training for module in model.modules())


def test_adding_changes_nothing_else() -> None:
    model = alone("first").eval()
    model.embedding.requires_grad_(True)
    hooks = [list(module._forward_pre_hooks.values()) for module in model.modules()]
    before, trained = model.state_dict(), set(trainable(model))
    dora = DoRA(MLP, dim=4)
    assert dora_fx.add_adapter(model, "second", dora) is model
    assert dora_fx.adapter_names(model) == ("default", "second")
    assert dora.report is not None and len(dora.report.sites) == 4
    assert set(trainable(model)) == trained and not any(module.training for module in model.modules())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items() if torch.is_tensor(value))
    dora_fx.delete_adapter(model, "second")
    assert dora_fx.adapter_names(model) == ("default",)
    assert hooks == [list(module._forward_pre_hooks.values()) for module in model.modules()]


def test_a_failed_addition_leaves_the_model_as_it_was() -> None:
    model = alone("first")
    expected = outcome(model)
    with pytest.raises(ValueError, match="no_such"):
        dora_fx.add_adapter(model, "second", DoRA(["no_such"]))
    assert dora_fx.adapter_names(model) == ("default",)
    assert_same(outcome(model), expected)


def test_merging_needs_the_others_away() -> None:
    model = with_all()
    with pytest.raises(ValueError, match=r"found adapters \['mlp', 'wide', 'like first'\] beside the active one"):
        dora_fx.merge(model)
    with dora_fx.merged(model), pytest.raises(ValueError, match=r"layers\.0\..*: found the adapter merged into it"):
        dora_fx.set_adapter(model, "wide")
    for name in ("mlp", "wide", "like first"):
        dora_fx.delete_adapter(model, name)
    with dora_fx.merged(model):
        assert dora_fx.adapter_names(model) == ("first",)
        with pytest.raises(ValueError, match="found the adapter merged into it"):
            dora_fx.add_adapter(model, "wide", DoRA(MLP))
    assert dora_fx.active_adapter(model) == "first"
    dora_fx.merge(model)
    assert dora_fx.active_adapter(model) is None
    dora_fx.add_adapter(model, "again", DoRA(MLP))
    assert dora_fx.adapter_names(model) == ("again",)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "taken": (lambda model: dora_fx.add_adapter(model, "wide", DoRA(MLP)), r"adapter 'wide': found it on the model"),
    "empty": (lambda model: dora_fx.add_adapter(model, "", DoRA(MLP)), "name: found '', expected"),
    "dotted": (lambda model: dora_fx.add_adapter(model, "a.b", DoRA(MLP)), r"name: found 'a\.b', expected"),
    "unknown": (lambda model: dora_fx.set_adapter(model, "wid"), r"adapter 'wid': found no such adapter.*'wide'"),
    "deleted unknown": (lambda model: dora_fx.delete_adapter(model, "x"), "adapter 'x': found no such adapter"),
    "deleted active": (lambda model: dora_fx.delete_adapter(model, "first"), "adapter 'first': found it active"),
}


@every_case("case", list(REFUSED))
def test_refusals(case: str) -> None:
    model = with_all()
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert dora_fx.adapter_names(model) == tuple(SETTINGS)


def test_a_layer_that_was_replaced_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    for name, targets in {"first": ["0"], "second": ["1"]}.items():
        dora_fx.add_adapter(model, name, DoRA(targets, dim=2))
    model[1] = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"^1: found another layer in the place of the one that adapter 'second'"):
        dora_fx.set_adapter(model, "second")
    assert dora_fx.active_adapter(model) == "first" and isinstance(model[0], dora_fx.DoRALinear)


def test_norms_of_all_adapters_are_invalidated_together() -> None:
    model = with_all()
    with torch.no_grad():
        # A few rows: a sample may miss them.
        model.decoder.layers[0].mlp.linear_fc1.weight.data[3] *= 2.0
    dora_fx.invalidate_norms(model)
    twin = alone("like first")
    twin.decoder.layers[0].mlp.linear_fc1.weight.data[3] *= 2.0
    dora_fx.invalidate_norms(twin)
    assert_same(outcome(dora_fx.set_adapter(model, "like first")), outcome(twin))


def test_an_adapter_of_a_name_that_another_had_is_not_that_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for name in ("one", "two"):
        dora_fx.add_adapter(model, name, DoRA(["0"], dim=2))
    dora_fx.set_adapter(model, "two")
    loss = checkpoint(model, torch.randn(3, 6, requires_grad=True), use_reentrant=False).sum()
    dora_fx.set_adapter(model, "one")
    dora_fx.delete_adapter(model, "two")
    dora_fx.add_adapter(model, "two", DoRA(["0"], dim=2))
    dora_fx.set_adapter(model, "two")
    with pytest.raises(RuntimeError, match=r"repeats a call of 'two \(deleted\)'"):
        loss.backward()


def test_an_adapter_that_is_off_stays_the_active_one() -> None:
    model = with_all()
    with dora_fx.disable_adapter(model), pytest.raises(ValueError, match="found its adapter switched off"):
        dora_fx.set_adapter(model, "wide")


def test_a_data_parallel_wrapper_knows_one_adapter() -> None:
    model = with_all()
    wrap = lambda: DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)  # noqa: E731
    first = wrap()
    with pytest.raises(ValueError, match="adapter 'wide': found DistributedDataParallel made for another adapter"):
        dora_fx.set_adapter(first, "wide")
    with pytest.raises(ValueError, match="adapter 'more': found DistributedDataParallel around the model"):
        dora_fx.add_adapter(first, "more", DoRA(MLP))


def test_transformers_models_and_their_files(tmp_path: Path) -> None:
    model = tiny_hf_model("llama")
    targets = ["q_proj", "down_proj"]
    dora_fx.add_adapter(model, "policy", DoRA(targets, dim=4))
    dora_fx.add_adapter(model, "reference", DoRA(targets, dim=4))
    for seed, name in enumerate(("policy", "reference")):
        with dora_fx.adapter(model, name):
            randomize_adapters(model, seed=seed)
            model.save_pretrained(tmp_path / name)
    logits = {}
    for name in ("policy", "reference"):
        with dora_fx.adapter(model, name):
            logits[name] = model(token_ids()).logits
        dora_fx.import_hf(twin := tiny_hf_model("llama"), tmp_path / name)
        assert torch.equal(twin.eval()(token_ids()).logits, logits[name])
    assert not torch.equal(logits["policy"], logits["reference"])
