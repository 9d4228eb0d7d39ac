"""Norms are computed once per optimizer step, and never read stale, by compiled and by eager code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx.cache.freshness import StaleParametersError
from tests.closeness import assert_apart, assert_close
from tests.distributed.mutations import BITS_ARE_NOT_COMPARED, planted
from tests.models import LinearZoo, adapt_zoo, logits_of, sites, tiny_gpt, token_ids, trainable
from tests.oracle import reference_outputs, reference_zoo
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

KINDS = ["column", "row_bias_added", "linear"]


def compiled(model: Callable[..., Any], weight_norm: str = "once_per_step") -> Callable[..., Any]:
    options = {"inner_compiler": "aot_eager", "weight_norm": weight_norm}
    return torch.compile(model, backend="dora_fx", options=options, fullgraph=True)


def eager(zoo: LinearZoo) -> Callable[..., Any]:
    return zoo


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(5, 24, generator=generator, dtype=torch.float64) for kind in KINDS}


@pytest.fixture
def zoo() -> LinearZoo:
    return adapt_zoo(LinearZoo(KINDS).double())


def refreshes(model: nn.Module) -> list[int]:
    """How often each site's norm was written."""
    return [site.cached_delta._version for site in sites(model).values()]


def assert_equals_oracle(run: Callable[..., dict[str, torch.Tensor]], model: LinearZoo) -> None:
    """A stale norm moves outputs by far more than rounding; the oracle computes its own of copies of the tensors."""
    assert_close(run(inputs()), reference_outputs(reference_zoo(model), inputs()), 1e-12)


def test_once_per_step_whatever_calls_in_between(zoo: LinearZoo) -> None:
    run = compiled(zoo)
    optimizer = torch.optim.AdamW(trainable(zoo).values(), lr=0.05)
    before = refreshes(zoo)
    for step in range(3):
        for micro_batch in range(8):
            sum(y.square().sum() for y in run(inputs(micro_batch)).values()).backward()
        zoo.eval()
        with torch.no_grad():
            run(inputs())
        zoo.train()
        assert refreshes(zoo) == [version + step + 1 for version in before]
        optimizer.step()
        optimizer.zero_grad()
    assert_equals_oracle(run, zoo)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_bitwise_that_of_refreshing_always(recompute: bool) -> None:
    def train(prepare: Callable[[nn.Module], None], weight_norm: str) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(4)
        model = dora_fx.DoRA(dim=6, alpha=12, dropout=0.1, lora_B_init_method="normal")(tiny_gpt())
        call = (lambda *args: checkpoint(model, *args, use_reentrant=False)) if recompute else model
        run = compiled(call, weight_norm)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
        for _ in range(3):
            for micro_batch in range(8):
                prepare(model)
                logits_of(run, token_ids(seed=micro_batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach() for name, parameter in trainable(model).items()}

    cached = train(lambda model: None, "checked")
    always = train(dora_fx.invalidate_norms, "once_per_step")
    assert all(torch.equal(cached[name], always[name]) for name in always)


def test_norm_of_every_call_is_that_of_once_per_step(zoo: LinearZoo) -> None:
    assert_equals_oracle(compiled(zoo, "every_call"), zoo)


@torch.no_grad()
def _write_in_place(zoo: LinearZoo) -> None:
    for parameter in trainable(zoo).values():
        parameter.mul_(1.5)


@torch.no_grad()
def _write_base_in_place(zoo: LinearZoo) -> None:
    for site in sites(zoo).values():
        site.weight.mul_(2.0)


def _replace_data(zoo: LinearZoo) -> None:
    for parameter in trainable(zoo).values():
        parameter.data = parameter.data * 1.5


def _larger(zoo: LinearZoo) -> dict[str, torch.Tensor]:
    """The model's tensors times 1.5; Megatron's layers have entries without a tensor as well."""
    return {name: entry if entry is None else entry * 1.5 for name, entry in zoo.state_dict().items()}


def _load(zoo: LinearZoo) -> None:
    zoo.load_state_dict(_larger(zoo))


def _load_by_assignment(zoo: LinearZoo) -> None:
    zoo.load_state_dict(_larger(zoo), assign=True)
    zoo.requires_grad_(False)


def _change_alpha(zoo: LinearZoo) -> None:
    for site in sites(zoo).values():
        site.adapter.alpha *= 3.0


def _cast(zoo: LinearZoo) -> None:
    zoo.float().double()


def _write_through_data_and_say_so(zoo: LinearZoo) -> None:
    for parameter in trainable(zoo).values():
        parameter.data.mul_(1.5)
    dora_fx.invalidate_norms(zoo)


@pytest.mark.parametrize(
    "change",
    [
        _write_in_place,
        _write_base_in_place,
        _replace_data,
        _load,
        _load_by_assignment,
        _change_alpha,
        _cast,
        _write_through_data_and_say_so,
    ],
)
@pytest.mark.parametrize("how", [compiled, eager])
def test_changes_are_noticed(zoo: LinearZoo, change: Callable[[LinearZoo], None], how: Callable[..., Any]) -> None:
    run = how(zoo)
    assert_equals_oracle(run, zoo)
    change(zoo)
    assert_equals_oracle(run, zoo)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_loading_a_checkpoint_is_noticed(gated: bool, tmp_path: Path) -> None:
    """A gated layer's tensors are loaded in halves."""
    activation = {} if gated else {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
    model = dora_fx.DoRA(dim=6, lora_B_init_method="normal")(tiny_gpt(**activation).double())
    dora_fx.save_checkpoint(model, tmp_path / "saved")
    run = compiled(model)
    expected = logits_of(run, token_ids())
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(1.5)
    assert_apart(logits_of(run, token_ids()), expected)
    dora_fx.load_checkpoint(model, tmp_path / "saved")
    assert torch.equal(logits_of(run, token_ids()), expected)


def test_merging_and_unmerging_is_noticed(zoo: LinearZoo) -> None:
    run = compiled(zoo)
    expected = run(inputs())
    dora_fx.merge(zoo, keep_adapter=True)
    assert_close(run(inputs()), expected, 1e-12)
    dora_fx.unmerge(zoo)
    assert_equals_oracle(run, zoo)


def test_a_copy_has_norms_of_its_own() -> None:
    layer = adapt_zoo(LinearZoo(["linear"]).double()).linear
    x = inputs()["linear"]
    compiled(layer)(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.adapter.linear_out.weight.mul_(1.5)
    for module in (twin, layer):
        assert_close(compiled(module)(x), module(x), 1e-12)


def test_layers_that_share_a_graph_have_norms_of_their_own() -> None:
    first, second = adapt_zoo(LinearZoo(["row"]).double()), adapt_zoo(LinearZoo(["row"]).double())
    _write_in_place(second)
    for layer in (first.row, second.row):
        layer.compile(backend="dora_fx", options={"inner_compiler": "aot_eager"}, fullgraph=True)
    x = inputs()["column"]
    for layer in (first.row, second.row):
        assert_close(layer(x)[0], layer.forward(x)[0], 1e-12)


def _factor(zoo: LinearZoo) -> torch.Tensor:
    return zoo.row_bias_added.adapter.linear_out.weight


PAST_THE_VERSION_COUNTER: dict[str, Callable[[LinearZoo], None]] = {
    "scaled": lambda zoo: _factor(zoo).data.mul_(1.5),
    "negated": lambda zoo: _factor(zoo).data.neg_(),
    "rows permuted": lambda zoo: _factor(zoo).data.copy_(_factor(zoo).data.flip(0)),
    "one element": lambda zoo: _factor(zoo).data[3, 2].add_(1.0),
    "one element in its last bit": lambda zoo: _factor(zoo).data[3, 2].mul_(1.0 + 2**-52),
    "two elements swapped": lambda zoo: _factor(zoo).data[0, :2].copy_(_factor(zoo).data[0, :2].flip(0)),
    "A": lambda zoo: zoo.row_bias_added.adapter.linear_in.weight.data.mul_(0.5),
    "through numpy": lambda zoo: _factor(zoo).detach().numpy().__imul__(1.5),
    "base": lambda zoo: zoo.row_bias_added.weight.data.mul_(0.5),
    "the cache itself": lambda zoo: zoo.row_bias_added.cached_delta.mul_(2.0),
}


@every_case("name", PAST_THE_VERSION_COUNTER)
def test_writes_past_the_version_counter_are_noticed(name: str) -> None:
    # The first call computes, the second compares site by site, and the third all sites at once.
    for calls in (1, 2, 3):
        assert_notices(name, eager, calls)


# One of each tensor, and the least change of one: compiled code asks the same fingerprint.
@pytest.mark.parametrize(
    "name", ["one element in its last bit", "two elements swapped", "A", "base", "the cache itself"]
)
def test_writes_past_the_version_counter_are_noticed_by_compiled_code(name: str) -> None:
    assert_notices(name, compiled)


def assert_notices(name: str, how: Callable[..., Any], calls: int = 1) -> None:
    zoo = adapt_zoo(LinearZoo(KINDS).double())
    run = how(zoo)
    for _ in range(calls):
        run(inputs())
    PAST_THE_VERSION_COUNTER[name](zoo)
    assert_equals_oracle(run, zoo)


def test_swapping_averaged_parameters_in_and_out_is_noticed(zoo: LinearZoo) -> None:
    run = compiled(zoo)
    expected = {kind: y.detach().clone() for kind, y in run(inputs()).items()}
    averages = {parameter: parameter.detach() * 1.2 for parameter in trainable(zoo).values()}
    for turn in range(2):
        for parameter, average in averages.items():
            kept = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(kept)
        assert_equals_oracle(run, zoo)
        if turn == 0:
            assert_apart(run(inputs())["linear"], expected["linear"])
    assert all(torch.equal(y, expected[kind]) for kind, y in run(inputs()).items())


def test_moving_and_writing_the_same_values_refreshes_nothing(zoo: LinearZoo) -> None:
    """What a rank may do alone, as its tensor-parallel group would wait for it otherwise."""
    run = compiled(zoo)
    run(inputs())
    before = refreshes(zoo)
    zoo.to("cpu")
    zoo.load_state_dict(zoo.state_dict())
    zoo.load_state_dict({key: value if value is None else value.clone() for key, value in zoo.state_dict().items()})
    for parameter in trainable(zoo).values():
        parameter.data = parameter.data.clone()
    run(inputs())
    assert refreshes(zoo) == before


def test_check_notices_what_nothing_says(zoo: LinearZoo) -> None:
    """A row of the base weight that is not among those looked at in every call."""
    run = compiled(zoo, "checked")
    run(inputs())
    zoo.row_bias_added.weight.data[1].mul_(1.5)
    with pytest.raises(StaleParametersError, match=r"row_bias_added: its cached scales or factors are off by up to"):
        run(inputs())
    dora_fx.invalidate_norms(zoo)
    assert_equals_oracle(run, zoo)


def test_planted_fault_is_noticed(zoo: LinearZoo) -> None:
    run = compiled(zoo, "checked")
    run(inputs())
    _factor(zoo).data.mul_(1.5)
    with planted(BITS_ARE_NOT_COMPARED), pytest.raises(StaleParametersError):
        run(inputs())


def test_steps_of_an_optimizer_that_writes_through_data(zoo: LinearZoo) -> None:
    """As Megatron's: it steps copies, and writes them back where neither memory nor version tells."""
    run = compiled(zoo, "checked")
    masters = {parameter: parameter.detach().clone() for parameter in trainable(zoo).values()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1)
    sum(y.square().sum() for y in run(inputs()).values()).backward()
    for parameter, master in masters.items():
        master.grad = parameter.grad
    before = refreshes(zoo)
    optimizer.step()
    for parameter, master in masters.items():
        parameter.data.copy_(master)
    # The step alone makes norms stale, so that the ranks of a group need not agree.
    with planted(BITS_ARE_NOT_COMPARED):
        assert_equals_oracle(run, zoo)
    assert refreshes(zoo) == [version + 1 for version in before]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_other_compilers_measure_a_base_that_was_written(zoo: LinearZoo, backend: str) -> None:
    run = torch.compile(zoo, backend=backend, fullgraph=True)
    run(inputs())
    _write_base_in_place(zoo)
    zoo.to(torch.float32).to(torch.float64)
    assert_equals_oracle(run, zoo)


def test_parameters_computed_in_the_graph_are_not_cached(zoo: LinearZoo) -> None:
    """A parametrization makes the factor anew in each call."""

    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 0.5

    nn.utils.parametrize.register_parametrization(zoo.linear.adapter.linear_out, "weight", Halved())
    run, before = compiled(zoo), refreshes(zoo)
    found = run(inputs())
    assert [now > then for now, then in zip(refreshes(zoo), before, strict=True)] == [True, True, False]
    assert_close(found, reference_outputs(reference_zoo(zoo), inputs()), 1e-12)


@pytest.mark.parametrize("run_as", [compiled, eager])
@pytest.mark.parametrize("freed", ["weight", "adapter.linear_out.weight", "cached_delta"])
def test_freed_memory_is_an_error(zoo: LinearZoo, run_as: Callable[..., Any], freed: str) -> None:
    """PyTorch would read address zero."""
    run = run_as(zoo)
    run(inputs())
    owner, _, name = f"row_bias_added.{freed}".rpartition(".")
    getattr(zoo.get_submodule(owner), name).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^row_bias_added: found a tensor .* whose memory was freed"):
        run(inputs())
