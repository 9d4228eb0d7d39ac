"""`DoRALinear` is a drop-in for the layer that it wraps: returns, switches, casts, norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx import DoRALinear, ParallelLinearDoRAAdapter, disable_adapter
from dora_fx.function.row_scale import row_scale, scale_rows
from dora_fx.function.weight_norm import norm_dtype
from tests.closeness import assert_apart, assert_close, rounding
from tests.models import (
    DIM,
    IN,
    LINEAR_KINDS,
    OUT,
    LinearZoo,
    adapt_zoo,
    logits_of,
    randomize_adapters,
    sites,
    tiny_gpt,
    token_ids,
    trainable,
)
from tests.reference import row_norms
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")


@every_case("shape", [(7, IN), (5, 3, IN)])
@every_case("kind", LINEAR_KINDS)
def test_returns_what_the_base_layer_returns(kind: str, shape: tuple[int, ...]) -> None:
    zoo = LinearZoo([kind])
    kwargs = {"weight": zoo.embedding.weight} if kind == "output_layer" else {}
    x = torch.randn(shape)
    base = getattr(zoo, kind)(x, **kwargs)
    adapted = getattr(adapt_zoo(zoo), kind)(x, **kwargs)
    assert type(adapted) is type(base)
    if isinstance(base, tuple):
        (base, base_bias), (adapted, adapted_bias) = base, adapted
        assert adapted_bias is base_bias
    assert (adapted.shape, adapted.dtype) == (base.shape, base.dtype)
    assert_apart(adapted, base)


def test_output_layer_tied_to_the_embedding_needs_no_weight_argument() -> None:
    """Megatron passes the shared weight; without it the site uses the one it was attached to."""
    model = dora_fx.DoRA(["output_layer"], dim=DIM)(tiny_gpt(tied=True))
    site = model.output_layer
    assert site.weight is None
    assert site.base_weight is model.shared_embedding_or_output_weight()
    assert "output_layer.weight" not in dict(model.named_parameters())
    before = logits_of(model, token_ids())
    randomize_adapters(model)
    assert_apart(logits_of(model, token_ids()), before)


def test_weight_given_at_call_time_is_a_frozen_one() -> None:
    zoo = adapt_zoo(LinearZoo(["output_layer"]))
    with pytest.raises(ValueError, match="output_layer: the base weight requires grad"):
        zoo.output_layer(torch.randn(5, IN), weight=nn.Parameter(torch.randn(OUT, IN)))


def test_adapters_off_and_on() -> None:
    model = tiny_gpt()
    base = logits_of(model, token_ids())
    randomize_adapters(dora_fx.DoRA(dim=DIM)(model))
    adapted = logits_of(model, token_ids())
    off = next(iter(sites(model).values()))
    off.disable_adapter_layers()
    partly = logits_of(model, token_ids())
    with disable_adapter(model):
        assert torch.equal(logits_of(model, token_ids()), base)
        with disable_adapter(model):
            assert torch.equal(logits_of(model, token_ids()), base)
        assert torch.equal(logits_of(model, token_ids()), base)
    assert torch.equal(logits_of(model, token_ids()), partly)
    off.enable_adapter_layers()
    assert torch.equal(logits_of(model, token_ids()), adapted)
    assert_apart(adapted, base)
    assert_apart(adapted, partly)


def test_context_restores_after_an_error() -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    adapted = zoo.row(torch.ones(2, IN))[0]
    with pytest.raises(KeyError), disable_adapter(zoo):
        raise KeyError
    assert torch.equal(zoo.row(torch.ones(2, IN))[0], adapted)


def test_switching_adapters_reaches_compiled_code() -> None:
    zoo = adapt_zoo(LinearZoo(["column_bias_added", "linear_bias"]))
    inputs = {kind: torch.randn(5, IN) for kind in zoo.kinds}
    call = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "aot_eager"}, fullgraph=True)
    adapted = call(inputs)
    with disable_adapter(zoo):
        base = call(inputs)
        assert_close(base, zoo(inputs), rounding(torch.float32, IN))
    again = call(inputs)
    for kind in zoo.kinds:
        assert torch.equal(again[kind], adapted[kind])
        assert_apart(base[kind], adapted[kind])


@every_case("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_attached_to_a_model_of_any_dtype(dtype: torch.dtype) -> None:
    zoo = dora_fx.DoRA(["row", "linear"], dim=DIM)(LinearZoo(["row", "linear"]).to(dtype))
    for site in sites(zoo).values():
        assert site.adapter.linear_in.weight.dtype == site.adapter.linear_out.weight.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        assert site.adapter.weight_magnitude.dtype == site.base_norm_sq.dtype == site._get_weight_norm().dtype == wide


CASTS: dict[str, Any] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.bfloat16),
    "to_device_and_dtype": lambda model: model.to("cpu", torch.float16),
}


@every_case("cast", CASTS.values(), ids=CASTS)
def test_casting_a_model_does_not_round_the_magnitude(cast: Any) -> None:
    zoo = adapt_zoo(LinearZoo())
    zoo(inputs := {kind: torch.randn(5, IN) for kind in zoo.kinds})["row"].sum().backward()
    before = {kind: getattr(zoo, kind).adapter.weight_magnitude.detach().clone() for kind in zoo.kinds}
    gradient = zoo.row.adapter.weight_magnitude.grad.clone()
    parameters = [id(parameter) for parameter in zoo.parameters()]
    cast(zoo)
    assert [id(parameter) for parameter in zoo.parameters()] == parameters
    assert torch.equal(zoo.row.adapter.weight_magnitude.grad, gradient)
    for kind in zoo.kinds:
        site = getattr(zoo, kind)
        assert site.adapter.linear_in.weight.dtype == site.base_weight.dtype != torch.float32
        assert site.adapter.weight_magnitude.dtype == site.base_norm_sq.dtype == torch.float32
        assert torch.equal(site.adapter.weight_magnitude, before[kind])
    outputs = zoo({kind: x.to(zoo.row.weight.dtype) for kind, x in inputs.items()})
    for site in sites(zoo).values():
        measured = site.base_weight.double().square().sum(1)
        assert_close(site.base_norm_sq, measured, rounding(torch.float32, IN))
    torch.stack([output.float().sum() for output in outputs.values()]).sum().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in trainable(zoo).values())


def test_double_widens_the_magnitude_and_float_returns_it() -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    before = zoo.row.adapter.weight_magnitude.detach().clone()
    assert zoo.double().row.adapter.weight_magnitude.dtype == torch.float64
    assert zoo.row.base_norm_sq.dtype == torch.float64
    assert zoo.float().row.adapter.weight_magnitude.dtype == torch.float32
    assert torch.equal(zoo.row.adapter.weight_magnitude, before)


def test_casting_the_adapter_alone_does_not_round_the_magnitude() -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    before = zoo.row.adapter.weight_magnitude.detach().clone()
    zoo.row.adapter.bfloat16()
    assert zoo.row.adapter.linear_in.weight.dtype == torch.bfloat16
    assert torch.equal(zoo.row.adapter.weight_magnitude, before)


@every_case("kind", LINEAR_KINDS)
def test_norm_is_that_of_the_dense_weight_and_has_no_gradient(kind: str) -> None:
    site = getattr(adapt_zoo(LinearZoo([kind]).double()), kind)
    lora_a, lora_b = site.adapter.linear_in.weight, site.adapter.linear_out.weight
    expected = row_norms(site.base_weight, lora_a, lora_b, site.scaling)
    norm = site._get_weight_norm()
    assert not norm.requires_grad
    assert_close(norm, expected, rounding(torch.float64, IN + DIM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_of_rows_that_cancel(dtype: torch.dtype) -> None:
    """sBA = -W0 but for a rest of one part in ten thousand: rounding must not make the square negative."""
    zoo = LinearZoo(["linear"]).to(dtype)
    dora_fx.DoRA(["linear"], dim=IN, alpha=IN)(zoo)
    site, rest = zoo.linear, 1e-4
    with torch.no_grad():
        site.adapter.linear_in.weight.copy_(torch.eye(IN))
        site.adapter.linear_out.weight.copy_(-(1 - rest) * site.base_weight)
    norm, scale = site._get_weight_norm(), site.base_norm_sq.sqrt()
    assert torch.isfinite(norm).all()
    # The square is worked out from terms of the size of the weight's, so its error is some of their last bits.
    assert ((norm.square() - (rest * scale).square()).abs() <= 20 * torch.finfo(dtype).eps * scale.square()).all()
    with torch.no_grad():
        site.adapter.linear_out.weight.copy_(-site.base_weight)
    assert torch.isfinite(zoo({"linear": torch.randn(5, IN, dtype=dtype)})["linear"]).all()


def test_norm_in_bfloat16_keeps_float32_accuracy() -> None:
    zoo = adapt_zoo(LinearZoo().bfloat16())
    for site in sites(zoo).values():
        factors = (site.adapter.linear_in.weight, site.adapter.linear_out.weight)
        expected = row_norms(site.base_weight.double(), *(factor.double() for factor in factors), site.scaling)
        assert_close(site._get_weight_norm(), expected, rounding(torch.float32, IN + DIM))


def test_built_by_hand() -> None:
    linear = nn.Linear(8, 6).requires_grad_(False)
    adapter = ParallelLinearDoRAAdapter(8, 6, 2, alpha=4)
    x = torch.randn(3, 8)
    layer = DoRALinear(linear, adapter)
    assert torch.equal(layer(x), linear(x))
    assert_close(adapter.get_weight_magnitude(), linear.weight.double().norm(dim=1), rounding(torch.float32, 8))
    given = ParallelLinearDoRAAdapter(8, 6, 2, alpha=4)
    given.init_weight_magnitude(2 * linear.weight.norm(dim=1))
    doubled = DoRALinear(linear, given)(x)
    assert_close(doubled - linear.bias, 2 * (linear(x) - linear.bias), rounding(torch.float32, 8 + 2))


def test_an_adapter_may_be_moved_before_it_has_a_magnitude() -> None:
    adapter = ParallelLinearDoRAAdapter(8, 6, 2).to(torch.bfloat16)
    assert adapter.weight_magnitude is None
    assert list(adapter.state_dict()) == ["linear_in.weight", "linear_out.weight"]
    linear = nn.Linear(8, 6).bfloat16().requires_grad_(False)
    layer, x = DoRALinear(linear, adapter), torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x))
    assert adapter.weight_magnitude.dtype == torch.float32
    assert list(adapter.state_dict()) == ["weight_magnitude", "linear_in.weight", "linear_out.weight"]


def test_copies_are_independent() -> None:
    zoo = adapt_zoo(LinearZoo(["linear_bias"]))
    twin = copy.deepcopy(zoo)
    x = {"linear_bias": torch.randn(3, IN)}
    before = zoo(x)["linear_bias"]
    with torch.no_grad():
        twin.linear_bias.adapter.weight_magnitude.mul_(2)
    assert torch.equal(zoo(x)["linear_bias"], before)
    assert_apart(twin(x)["linear_bias"], before)


def test_adapter_computes_nothing_itself() -> None:
    with pytest.raises(TypeError, match="DoRALinear"):
        ParallelLinearDoRAAdapter(8, 6, 2)(torch.randn(3, 8))


@every_case("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_magnitude_at_and_near_zero(dtype: torch.dtype) -> None:
    """dm is the sum of dy z / n whatever m is, although it is taken from g dy."""
    torch.manual_seed(5)
    wide = norm_dtype(dtype)
    norm = torch.rand(9, dtype=wide) + 0.5
    gain = torch.tensor([0.0, -0.0, 1e-30, -1e-12, 1e-5, -1e-3, 0.1, 1.0, -2.0], dtype=wide)
    magnitude = (gain * norm).requires_grad_()
    z, dy = (torch.randn(300, 9, dtype=wide).to(dtype) for _ in range(2))
    z.requires_grad_()
    y = scale_rows(z, bias=None, magnitude=magnitude, scale=row_scale(magnitude, norm, dtype))
    dz, dm = torch.autograd.grad(y, [z, magnitude], dy)
    eps = torch.finfo(dtype).eps
    z, dy, gain = z.double(), dy.double(), gain.double()
    # delta and g have one rounding of a number up to 1 + |g|, their products with z and dy another one.
    size = 2 * eps * (1.0 + gain.abs())
    assert ((y.double() - z * gain).abs() <= size * z.abs()).all()
    assert ((dz.double() - dy * gain).abs() <= size * dy.abs()).all()
    # Each of the 300 terms has the rounding of its dz, of which float16 keeps the fewer bits the smaller it is.
    terms = dy * z / norm.double()
    smallest = torch.finfo(dtype).smallest_normal * eps * (z.abs().sum(0) / norm.double())
    floor = torch.finfo(dtype).eps / 16
    assert ((dm.double() - terms.sum(0)).abs() <= 2 * eps * terms.abs().sum(0) + smallest / floor).all()


def test_gradient_of_the_magnitude_of_a_row_of_zeros() -> None:
    """Such a row has no direction to scale."""
    norm, magnitude = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64, requires_grad=True)
    z = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    y = scale_rows(z, bias=None, magnitude=magnitude, scale=row_scale(magnitude, norm, torch.float64))
    dz, dm = torch.autograd.grad(y.sum(), [z, magnitude])
    assert torch.equal(dz, torch.ones_like(z)) and torch.equal(dm, torch.zeros(3, dtype=torch.float64))
