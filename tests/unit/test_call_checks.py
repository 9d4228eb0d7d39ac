"""Calls of a model check all its layers once, and layers check for themselves wherever they are called alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx.cache import call_check
from tests.closeness import assert_apart, assert_close
from tests.distributed.mutations import Mutation, planted
from tests.models import LinearZoo, adapt_zoo, logits_of, sites, tiny_gpt, token_ids, trainable
from tests.oracle import reference_outputs, reference_zoo

pytestmark = pytest.mark.usefixtures("world")

KINDS = ["column", "linear"]
BITS_OF_A_MODEL_ARE_NOT_COMPARED = Mutation(
    "stale norm", call_check.CallCheck.holds_for, "digest_of(known.runs) == known.bits", "True"
)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {kind: torch.randn(5, 24, generator=generator, dtype=torch.float64) for kind in KINDS}


@pytest.fixture
def zoo() -> LinearZoo:
    return adapt_zoo(LinearZoo(KINDS).double())


def assert_equals_oracle(zoo: LinearZoo, found: dict[str, torch.Tensor] | None = None) -> None:
    assert_close(zoo(inputs()) if found is None else found, reference_outputs(reference_zoo(zoo), inputs()), 1e-12)


def write_silently(zoo: nn.Module) -> None:
    for parameter in trainable(zoo).values():
        parameter.data.mul_(1.5)


def warm_up(zoo: LinearZoo) -> None:
    """Let what the third call compares be known."""
    for _ in range(3):
        zoo(inputs())


def test_planted_fault_is_seen(zoo: LinearZoo) -> None:
    warm_up(zoo)
    write_silently(zoo)
    with planted(BITS_OF_A_MODEL_ARE_NOT_COMPARED), pytest.raises(AssertionError):
        assert_equals_oracle(zoo)
    assert_equals_oracle(zoo)


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_compares_the_memory_that_a_refresh_compares(zoo: LinearZoo, kind: str) -> None:
    site = getattr(zoo, kind)
    found, stored, cached = site.site_tensors(), *site.cached_site()[1:]
    expected = {stored.lora_a, stored.lora_b, stored.magnitude, stored.base_norm_sq, stored.scaling}
    assert addresses(found.sources) == addresses(expected)
    assert addresses(found.weights) == {stored.weight.data_ptr()}
    assert addresses((found.scale, *found.values)) == addresses(each for each in cached if each is not None)


def addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def test_a_write_while_the_model_runs_is_noticed_by_its_next_call(zoo: LinearZoo) -> None:
    warm_up(zoo)
    hook = zoo.column.register_forward_pre_hook(lambda *_: write_silently(zoo))
    before = reference_outputs(reference_zoo(zoo), inputs())
    found = zoo(inputs())
    hook.remove()
    assert_apart(found["column"], before["column"])
    assert_equals_oracle(zoo)


def call_in_vain(zoo: LinearZoo) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    hook = zoo.linear.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        zoo(inputs())
    hook.remove()


def call_until_interrupted(zoo: LinearZoo) -> None:
    """Torch's hooks do not learn of this end, so the next call of the model has to."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = zoo.linear.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        zoo(inputs())
    hook.remove()


def call_a_part(zoo: LinearZoo) -> None:
    zoo.column(inputs()["column"])


@pytest.mark.parametrize("call", [warm_up, call_in_vain, call_a_part])
def test_a_layer_that_is_called_alone_checks(zoo: LinearZoo, call: Callable[[LinearZoo], None]) -> None:
    call(zoo)
    write_silently(zoo)
    x = inputs()
    assert_equals_oracle(zoo, {"column": zoo.column(x["column"])[0], "linear": zoo.linear(x["linear"])})


@pytest.mark.parametrize("call", [warm_up, call_in_vain, call_until_interrupted])
def test_a_model_checks_in_its_next_call(zoo: LinearZoo, call: Callable[[LinearZoo], None]) -> None:
    for _ in range(3):
        call(zoo)
        write_silently(zoo)
        assert_equals_oracle(zoo)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_check_their_own_layers(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = dora_fx.DoRA(dim=4, target_modules=["0"])(nn.Sequential(nn.Linear(24, 16, dtype=torch.float64)))
    x = inputs()["linear"]
    for _ in range(3):
        model(x)
    twin = duplicate(model)
    for module in (twin, model):
        write_silently(module)
        found = module(x)
        dora_fx.invalidate_norms(module)
        assert torch.equal(found, module(x))
    before = model(x)
    write_silently(twin)
    assert torch.equal(model(x), before)


def test_on_an_accelerator_few_calls_compare_bits(zoo: LinearZoo) -> None:
    """The bits of what is in host memory are at hand, so a record without them stands for one of an accelerator."""
    check = call_check.CallCheck()
    site_tensors = [site.site_tensors() for site in sites(zoo).values()]
    cached = [site.cached_site() for site in sites(zoo).values()]
    compared = []
    for call in range(1, 20):
        if not check.holds_for(site_tensors):
            check.refresh(site_tensors, cached)
            compared.append(call)
        if check._known is not None:
            check._known = check._known._replace(runs=None)
    # The first computes, and the second leaves a record.
    assert compared == [1, 2, 3, 5, 9, 17]
    with torch.no_grad():
        trainable(zoo)["column.adapter.weight_magnitude"].mul_(2.0)
    assert not check.holds_for(site_tensors)


def test_steps_of_several_calls_keep_what_their_first_call_found(zoo: LinearZoo) -> None:
    check = call_check.CallCheck()
    optimizer = torch.optim.SGD(trainable(zoo).values(), lr=0.01)

    def refreshes(num_calls: int) -> int:
        """How many calls of a step look at every tensor, before and after which nothing is written."""
        optimizer.step()
        found = 0
        for _ in range(num_calls):
            site_tensors = [site.site_tensors() for site in sites(zoo).values()]
            if not check.holds_for(site_tensors):
                check.refresh(site_tensors, [site.cached_site() for site in sites(zoo).values()])
                found += 1
        return found

    # The first step does not know that calls repeat.
    assert [refreshes(3) for _ in range(3)] == [2, 1, 1]
    for parameter in trainable(zoo).values():
        parameter.data = parameter.data.clone()
    assert [refreshes(2) for _ in range(2)] == [1, 1]
    write_silently(zoo)
    assert not check.holds_for([site.site_tensors() for site in sites(zoo).values()])
    # A step of one call leaves no record, as the one before it had no other that would read it.
    assert [refreshes(1) for _ in range(2)] == [1, 1] and check._known is None
    assert refreshes(2) == 2


def test_an_optimizer_that_steps_while_the_model_runs_ends_its_check(zoo: LinearZoo) -> None:
    warm_up(zoo)
    sum(y.square().sum() for y in zoo(inputs()).values()).backward()
    optimizer = torch.optim.SGD(trainable(zoo).values(), lr=0.01)
    hook = zoo.column.register_forward_pre_hook(lambda *_: optimizer.step())
    found = zoo(inputs())
    hook.remove()
    assert_equals_oracle(zoo, found)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_compiled_models_notice_silent_writes_in_every_mode(scope: Any) -> None:
    dora = dora_fx.DoRA(dim=6, alpha=12, lora_B_init_method="normal")
    model, twin = dora(tiny_gpt().double()), dora(tiny_gpt().double())
    twin.load_state_dict(model.state_dict())
    dora_fx.compile_model(model, scope, inner_compiler="aot_eager")
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            for _ in range(3):
                logits_of(model, token_ids())
            for each in (model, twin):
                write_silently(each)
            dora_fx.invalidate_norms(twin)
            assert_close(logits_of(model, token_ids()), logits_of(twin, token_ids()), 1e-12)


def test_gradients_of_a_whole_model_that_is_recomputed() -> None:
    model = dora_fx.DoRA(dim=6, alpha=12, lora_B_init_method="normal")(tiny_gpt().double())
    expected = {}
    for recompute in (False, True):
        call = (lambda *args: checkpoint(model, *args, use_reentrant=False)) if recompute else model
        logits_of(call, token_ids()).square().sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
        model.zero_grad()
        expected = expected or found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
