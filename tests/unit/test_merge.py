"""Merging: the plain model computes what the adapted one does, and unmerging brings back every bit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from torch import nn

import dora_fx
from dora_fx import DoRALinear
from dora_fx.attach.kept_adapter import kept_adapter_maybe
from tests.closeness import assert_as_exact, assert_close, rounding, roundings_of
from tests.models import (
    DIM,
    GPT_TARGETS,
    IN,
    LINEAR_KINDS,
    LinearZoo,
    adapt_zoo,
    logits_of,
    randomize_adapters,
    sites,
    tiny_gpt,
    token_ids,
)
from tests.oracle import reference_layer
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

OWN_WEIGHT = [kind for kind in LINEAR_KINDS if kind != "output_layer"]


def adapted_gpt(**overrides: object) -> nn.Module:
    model = dora_fx.DoRA(GPT_TARGETS, dim=DIM, alpha=12)(tiny_gpt(**overrides)).eval()
    randomize_adapters(model)
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@every_case("dtype", [torch.float32, torch.float64])
@every_case("kind", OWN_WEIGHT)
def test_a_merged_layer_computes_what_the_oracle_does(kind: str, dtype: torch.dtype) -> None:
    zoo = adapt_zoo(LinearZoo([kind]).to(dtype), dropout=0.5).eval()
    x = torch.randn(7, IN, dtype=dtype)
    site = getattr(zoo, kind)
    expected = reference_layer(site).eval()(x.double())
    kept = {name: value for name, value in site.to_wrap.named_parameters()}
    dora_fx.merge(zoo)
    layer = getattr(zoo, kind)
    assert type(layer) is type(LINEAR_KINDS[kind]())
    assert {name: value for name, value in layer.named_parameters()} == kept
    found, expected = (y if isinstance(y, tuple) else (y, None) for y in (layer(x), expected))
    assert_close(found[0], expected[0], rounding(dtype, IN + DIM))
    assert (found[1] is None) == (expected[1] is None)


def test_rows_of_zeros_stay_zero() -> None:
    zoo = LinearZoo(["column"])
    with torch.no_grad():
        zoo.column.weight[3] = 0.0
    adapt_zoo(zoo)
    with torch.no_grad():
        zoo.column.adapter.linear_out.weight[3] = 0.0
        zoo.column.adapter.weight_magnitude[3] = 2.0
    dora_fx.merge(zoo)
    assert torch.equal(zoo.column.weight[3], torch.zeros(IN))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_merged_model_is_a_plain_one(bias: bool) -> None:
    plain = tiny_gpt(add_bias_linear=bias)
    model = adapted_gpt(add_bias_linear=bias)
    expected = logits_of(model, token_ids())
    assert dora_fx.merge(model) is model
    assert sites(model) == {}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.sharded_state_dict().keys() == plain.sharded_state_dict().keys()
    assert_close(logits_of(model, token_ids()), expected, rounding(torch.float32, roundings_of(model)))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(plain.eval(), token_ids()), logits_of(model, token_ids()))


def test_bfloat16_is_rounded_once() -> None:
    """The merged weight is the nearest bfloat16 to the exact one, so the outputs differ by its rounding alone."""
    model = adapted_gpt(params_dtype=torch.bfloat16).bfloat16()
    with torch.no_grad():
        exact = {
            path: site.base_weight.double()
            + site.scaling * site.adapter.linear_out.weight.double() @ site.adapter.linear_in.weight.double()
            for path, site in sites(model).items()
        }
        for path, site in sites(model).items():
            exact[path] *= (site.adapter.weight_magnitude.double() / site._get_weight_norm().double())[:, None]
    adapted, exact_model = logits_of(model, token_ids()), adapted_gpt(params_dtype=torch.float64).double()
    exact_model.load_state_dict(model.state_dict())
    dora_fx.merge(model)
    for path, weight in exact.items():
        # Half a unit in the last place, and a thousandth of that for norms in float32.
        error = (model.get_submodule(path).weight.double() - weight).abs() / weight.abs()
        assert error.max() <= 2**-8 * 1.001, path
    assert_as_exact(logits_of(model, token_ids()), adapted, logits_of(exact_model, token_ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_brings_back_every_bit(dtype: torch.dtype) -> None:
    model = adapted_gpt(params_dtype=dtype).to(dtype)
    before, parameters = tensors(model), {id(parameter) for parameter in model.parameters()}
    logits = logits_of(model, token_ids())
    dora_fx.merge(model, keep_adapter=True)
    assert sites(model) == {}
    assert not any(".adapter." in name for name in model.state_dict())
    assert not torch.equal(logits_of(model, token_ids()), logits)
    assert dora_fx.unmerge(model) is model
    assert_same(tensors(model), before)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert torch.equal(logits_of(model, token_ids()), logits)
    dora_fx.merge(model)
    assert sites(model) == {}


def test_training_goes_on_after_unmerging() -> None:
    """An optimizer that was made before merging still holds the adapters' parameters."""

    def train(detour: bool) -> torch.Tensor:
        model = adapted_gpt()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            logits_of(model, token_ids()).square().mean().backward()
            optimizer.step()
            if detour:
                dora_fx.merge(model, keep_adapter=True)
                logits_of(model, token_ids())
                dora_fx.unmerge(model)
        return logits_of(model, token_ids())

    torch.manual_seed(3)
    expected = train(detour=False)
    torch.manual_seed(3)
    assert torch.equal(train(detour=True), expected)


def test_a_cast_while_merged_reaches_the_adapters() -> None:
    model, twin = adapted_gpt(), adapted_gpt()
    twin.load_state_dict(model.state_dict())
    twin.bfloat16()
    dora_fx.merge(model, keep_adapter=True)
    model.bfloat16()
    dora_fx.unmerge(model)
    assert_same(tensors(model), tensors(twin))
    assert {site.adapter.weight_magnitude.dtype for site in sites(model).values()} == {torch.float32}
    assert torch.equal(logits_of(model, token_ids()), logits_of(twin, token_ids()))


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_compiled_models_follow(whole: bool) -> None:
    model = adapted_gpt()
    options = {"backend": "dora_fx", "options": {"inner_compiler": "aot_eager"}, "fullgraph": True}
    for module in [model] if whole else model.decoder.layers:
        module.compile(**options)
    with torch.no_grad():
        adapted = logits_of(model, token_ids())
        dora_fx.merge(model, keep_adapter=True)
        torch._dynamo.utils.counters.clear()
        merged = logits_of(model, token_ids())
        assert torch._dynamo.utils.counters["dora_fx"]["sites_rewritten"] == 0
        assert torch._dynamo.utils.counters["dora_fx"]["graphs_compiled"] > 0
        dora_fx.unmerge(model)
        again = logits_of(model, token_ids())
    assert_close(merged, adapted, rounding(torch.float32, roundings_of(model)))
    assert torch.equal(again, adapted)


def test_chunks_inside_megatrons_wrappers() -> None:
    models = [adapted_gpt(bf16=True, params_dtype=torch.bfloat16) for _ in range(2)]
    half = Float16Module(models[0].config, models[0])
    data_parallel = DistributedDataParallel(models[1].config, DistributedDataParallelConfig(), models[1])
    chunks = [half, data_parallel]
    adapted = [logits_of(chunk, token_ids()) for chunk in chunks]
    assert dora_fx.merge(chunks, keep_adapter=True) is chunks
    assert [sites(model) for model in models] == [{}, {}]
    dora_fx.unmerge(chunks)
    assert [len(sites(model)) for model in models] == [8, 8]
    assert sum(buffer.grad_data.numel() for buffer in data_parallel.buffers) > 0
    dora_fx.merge(chunks)
    assert data_parallel.buffers == []
    for chunk, expected in zip(chunks, adapted, strict=True):
        # Each linear and norm rounds what it returns to bfloat16 once, with the merged weight as without it.
        assert_close(logits_of(chunk, token_ids()), expected, rounding(torch.bfloat16, 2 * 7 + 2))


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.inner = nn.Linear(8, 8)
        self.head.weight = self.embedding.weight


def test_what_would_change_another_layer_is_refused_before_anything_is_changed() -> None:
    tied = dora_fx.DoRA(["linear_fc1", "output_layer"], dim=DIM)(tiny_gpt(tied=True))
    shared = dora_fx.DoRA(["inner", "head"], dim=2)(TiedLinears())
    for model, message in (
        (tied, "output_layer: the layer multiplies by the embedding's weight, and merging would change the embedding"),
        (shared, "head: the layer shares its weight with embedding, which merging would change too"),
    ):
        randomize_adapters(model)
        before, adapted = tensors(model), sites(model)
        with pytest.raises(ValueError, match=message):
            dora_fx.merge(model)
        assert sites(model) == adapted
        assert_same(tensors(model), before)


def test_states_that_cannot_be_merged_are_named() -> None:
    with pytest.raises(ValueError, match="found no adapted layer"):
        dora_fx.merge(tiny_gpt())
    with pytest.raises(ValueError, match="found no merged layer"):
        dora_fx.unmerge(adapted_gpt())
    model = adapted_gpt()
    site: DoRALinear = model.decoder.layers[1].mlp.linear_fc2
    site.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"decoder.layers.1.mlp.linear_fc2: the adapter is disabled"):
        dora_fx.merge(model)
    site.enable_adapter_layers()
    with torch.no_grad():
        site.adapter.linear_out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"linear_fc2.adapter.linear_out.weight: found NaN or inf"):
        dora_fx.merge(model)
    assert len(sites(model)) == 8


MERGED_ALREADY = r"decoder\.layers\.0\..*: found a layer that is merged already; unmerge it first"
ADAPTED_AGAIN = r"decoder\.layers\.0\.self_attention\.linear_proj: found it adapted again since it was merged, "


def merge_and_keep(model: nn.Module) -> None:
    dora_fx.merge(model, keep_adapter=True)


def adapt_again(model: nn.Module) -> None:
    dora_fx.DoRA(GPT_TARGETS, dim=DIM)(model)
    randomize_adapters(model, seed=2)


def enter_merged(model: nn.Module) -> None:
    with dora_fx.merged(model):
        pytest.fail("merged a model twice")


def move_to_meta(model: nn.Module) -> None:
    model.to("meta")


@every_case(
    ("steps", "refused", "message"),
    [
        ([merge_and_keep], dora_fx.merge, MERGED_ALREADY),
        ([merge_and_keep], merge_and_keep, MERGED_ALREADY),
        ([merge_and_keep], enter_merged, MERGED_ALREADY),
        ([merge_and_keep, dora_fx.unmerge], dora_fx.unmerge, "found no merged layer"),
        ([dora_fx.merge], dora_fx.unmerge, "found no merged layer"),
        ([merge_and_keep, adapt_again], dora_fx.unmerge, ADAPTED_AGAIN + "by an adapter that is there"),
        ([merge_and_keep, adapt_again, dora_fx.merge], dora_fx.unmerge, ADAPTED_AGAIN + "and that adapter was merged"),
        ([merge_and_keep, adapt_again, dora_fx.merge], merge_and_keep, "found no adapted layer"),
        ([merge_and_keep, adapt_again], merge_and_keep, "linear_proj: found an adapter over a layer whose merge was"),
        ([merge_and_keep, adapt_again], enter_merged, "linear_proj: found an adapter over a layer whose merge was"),
        ([merge_and_keep, move_to_meta], dora_fx.unmerge, r"linear_proj\.weight: found one of shape .* on meta"),
    ],
)
def test_merging_out_of_order_is_refused_before_anything_is_changed(
    steps: list[Callable[[nn.Module], object]], refused: Callable[[nn.Module], object], message: str
) -> None:
    model = adapted_gpt()
    linears = {path: site.to_wrap for path, site in sites(model).items()}
    base = {path: site.base_weight.clone() for path, site in sites(model).items()}
    for step in steps:
        step(model)
    before, adapted = tensors(model), sites(model)
    with pytest.raises(ValueError, match=message):
        refused(model)
    assert sites(model) == adapted
    if not any(value.is_meta for value in before.values()):
        assert_same(tensors(model), before)
    if merge_and_keep in steps and dora_fx.unmerge not in steps:
        kept = {path: kept_adapter_maybe(linears[path]).weights for path in base}
        assert all(torch.equal(weights[0], base[path]) for path, weights in kept.items())


def test_within_merged_a_second_merge_is_refused_and_leaving_undoes_the_first() -> None:
    model = adapted_gpt()
    before = tensors(model)
    with dora_fx.merged(model):
        for refused in (dora_fx.merge, enter_merged):
            with pytest.raises(ValueError, match=MERGED_ALREADY):
                refused(model)
    assert_same(tensors(model), before)


def test_a_merge_that_fails_half_way_leaves_the_function() -> None:
    for keep in (True, False):
        model = adapted_gpt()
        before, expected = tensors(model), logits_of(model, token_ids())
        last = sites(model)["decoder.layers.1.mlp.linear_fc2"]
        lora_a = last.adapter.linear_in.weight
        last.adapter.linear_in.weight = nn.Parameter(lora_a.detach()[:, 1:])
        with pytest.raises(RuntimeError):
            dora_fx.merge(model, keep_adapter=keep)
        last.adapter.linear_in.weight = lora_a
        assert_close(logits_of(model, token_ids()), expected, rounding(torch.float32, roundings_of(model)))
        if keep:
            assert_same(tensors(model), before)
        else:
            assert list(sites(model).values()) == [last]


class Pair(nn.Module):
    """Two linears, the second of which no test adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)


def adapted_pair(model: Pair | None = None) -> Pair:
    model = dora_fx.DoRA(["one"], dim=2)(model or Pair())
    randomize_adapters(model)
    return model


def same_parameter(policy: Pair) -> nn.Module:
    reference = Pair()
    reference.one.weight = policy.one.weight
    return adapted_pair(reference)


def same_memory(policy: Pair) -> nn.Module:
    reference = Pair()
    reference.one.weight = nn.Parameter(policy.one.weight.detach().view(4, 6), requires_grad=False)
    return adapted_pair(reference)


def a_copy_but_for_the_base(policy: Pair) -> nn.Module:
    shared = {id(policy.one.weight): policy.one.weight}
    return copy.deepcopy(policy, shared)


def a_plain_model(policy: Pair) -> nn.Module:
    reference = Pair()
    reference.one.weight = policy.one.weight
    return nn.Sequential(reference)


def a_buffer_of_some_rows(policy: Pair) -> nn.Module:
    reference = Pair()
    reference.register_buffer("rows", policy.one.weight.detach()[1:3])
    return reference


SHARERS = {
    same_parameter: "one.weight of a Pair",
    same_memory: "one.weight of a Pair",
    a_copy_but_for_the_base: "one.weight of a Pair",
    a_plain_model: "0.one.weight of a Sequential",
    a_buffer_of_some_rows: "rows of a Pair",
}


@pytest.mark.parametrize("make", SHARERS, ids=lambda make: make.__name__)
def test_a_base_that_another_model_uses_too_is_not_written(make: Callable[[Pair], nn.Module]) -> None:
    policy = adapted_pair()
    reference = make(policy)
    message = f"one: found its base weight in the memory of {SHARERS[make]} outside the model too, which would change"
    before = tensors(policy), tensors(reference)
    for refused in (dora_fx.merge, merge_and_keep, enter_merged):
        with pytest.raises(ValueError, match=message):
            refused(policy)
    assert_same(tensors(policy), before[0])
    assert_same(tensors(reference), before[1])
    # A reference that is gone does not count, even before it is collected.
    gc.disable()
    try:
        reference.cycle = [reference]
        del reference
        dora_fx.merge(policy, keep_adapter=True)
    finally:
        gc.enable()
    late = make(policy) if make in (a_plain_model, a_buffer_of_some_rows) else a_plain_model(policy)
    before = tensors(policy), tensors(late)
    with pytest.raises(ValueError, match=r"one: found its base weight in the memory of .* outside the model too"):
        dora_fx.unmerge(policy)
    assert_same(tensors(policy), before[0])
    assert_same(tensors(late), before[1])
    del late
    dora_fx.unmerge(policy)


def test_neighbours_in_one_buffer_and_chunks_of_one_model_share_nothing() -> None:
    """Megatron's gradient buffers leave parameters as parts of one storage."""
    flat = torch.randn(2 * 24)
    chunks = [Pair(), Pair()]
    for chunk, part in zip(chunks, flat.split(24), strict=True):
        chunk.one.weight = nn.Parameter(part.view(4, 6))
    dora_fx.DoRA(["one"], dim=2)(chunks)
    randomize_adapters(chunks[0])
    before = flat.clone()
    whole = nn.ModuleList(chunks)
    dora_fx.merge(chunks[0], keep_adapter=True)
    assert not torch.equal(flat[:24], before[:24]) and torch.equal(flat[24:], before[24:])
    dora_fx.unmerge(whole)
    assert torch.equal(flat, before)


def test_two_layers_of_one_model_over_the_same_memory_are_named() -> None:
    model = Pair()
    model.two.weight = nn.Parameter(model.one.weight.detach())
    adapted_pair(model)
    with pytest.raises(ValueError, match=r"one: found its base weight in the memory of two\.weight too"):
        dora_fx.merge(model)
