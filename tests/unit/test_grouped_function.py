"""The DoRA function over the linear layers of many experts, expert by expert against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.measuring import peak_bytes
from dora_fx.function import grouped_norm, grouped_products, weight_norm
from dora_fx.function.grouped_formula import grouped_adapted_linear
from dora_fx.function.row_scale import row_scale
from dora_fx.function.site_parameters import SiteOperands
from tests import reference
from tests.closeness import assert_apart, assert_below, assert_close, relative_error, rounding
from tests.tables import every_case

SCALING, DROPOUT = 2.0, 0.3
IN, OUT, DIM = 24, 40, 6
# Tokens of each expert: usual ones, experts without any, all at one, one each, and none at all.
ROUTINGS = [[9, 4, 0, 7, 5, 3], [1, 0, 0, 20, 6, 2], [0, 0, 0, 0, 33, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]

Tensors = dict[str, torch.Tensor]


def layer(dtype: torch.dtype, *, dim: int = DIM, experts: int = 6, biased: bool = False) -> Tensors:
    """A layer of experts as if it was trained: B is not zero, and the magnitudes are not the norms."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = {
        "weight": (draw(experts, OUT, IN) * IN**-0.5).to(dtype),
        "lora_a": (draw(experts, dim, IN) * IN**-0.5).to(dtype),
        "lora_b": (draw(experts, OUT, dim) * 0.3).to(dtype),
    }
    dense = parts["weight"].double() + SCALING * parts["lora_b"].double() @ parts["lora_a"].double()
    gains = 1.0 + 0.5 * torch.tanh(draw(experts, OUT))
    parts["magnitude"] = (dense.norm(dim=2) * gains).to(weight_norm.norm_dtype(dtype))
    if biased:
        parts["bias"] = draw(experts, OUT).to(dtype)
    return parts


def base_output(parts: Tensors, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """What a layer returns that multiplies each expert's tokens by its weight and adds its bias."""
    bias = parts.get("bias", torch.zeros(len(counts), OUT, dtype=x.dtype))
    return torch.cat([own @ w.T + b for own, w, b in zip(x.split(counts), parts["weight"], bias, strict=True)])


def norms(parts: Tensors) -> torch.Tensor:
    weights, (a, b) = list(parts["weight"]), (parts["lora_a"], parts["lora_b"])
    dtype = weight_norm.norm_dtype(a.dtype)
    scaling = torch.tensor([SCALING], dtype=dtype)
    squares = grouped_norm.grouped_base_norm_squared(weights)
    terms = grouped_norm.grouped_norm_terms(squares, weights, a, b, scaling=scaling, dtype=dtype)
    return grouped_norm.grouped_norm_of_terms(*terms, b, scaling=scaling, dtype=dtype)


def found(
    parts: Tensors,
    x: torch.Tensor,
    counts: list[int],
    call: Any = grouped_adapted_linear,
    keep: torch.Tensor | None = None,
) -> Tensors:
    """Output and gradients of the function, of a loss that weighs every output differently.

    Args:
        keep: of dropout, the mask of the elements of x that survive; None without dropout.
    """
    leaves = {name: parts[name].detach().requires_grad_() for name in ("lora_a", "lora_b", "magnitude")}
    x = x.detach().requires_grad_()
    scale = row_scale(leaves["magnitude"], norms(parts), x.dtype)
    operands = SiteOperands(leaves["lora_a"], leaves["lora_b"], leaves["magnitude"], scale)
    scaling = torch.tensor([SCALING], dtype=scale.delta.dtype)
    left = None if keep is None else x * keep / (1.0 - DROPOUT)
    y = call(
        x,
        base_output(parts, x, counts),
        parts.get("bias"),
        torch.tensor(counts, dtype=torch.int32),
        operands,
        scaling,
        None if left is None else (left, base_output(parts, left, counts)),
    )
    return _with_gradients(y, {"x": x, **leaves})


def expected(parts: Tensors, x: torch.Tensor, counts: list[int], keep: torch.Tensor | None = None) -> Tensors:
    """What `found` should be, by the paper's formula for each expert alone, in float64."""
    wide = {
        name: value.detach().double().requires_grad_(name not in ("weight", "bias")) for name, value in parts.items()
    }
    x = x.detach().double().requires_grad_()
    outputs = [
        reference.dora_linear(
            own,
            wide["weight"][expert],
            wide["bias"][expert] if "bias" in wide else None,
            *(wide[name][expert] for name in ("lora_a", "lora_b", "magnitude")),
            scaling=SCALING,
            keep=None if keep is None else keep.split(counts)[expert],
            dropout_p=DROPOUT,
        )
        for expert, own in enumerate(x.split(counts))
    ]
    leaves = {name: wide[name] for name in ("lora_a", "lora_b", "magnitude")}
    return _with_gradients(torch.cat(outputs), {"x": x, **leaves})


def _with_gradients(y: torch.Tensor, leaves: Tensors) -> Tensors:
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    return {"y": y.detach(), **{f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True)}}


def inputs(counts: list[int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(counts))
    return torch.randn(sum(counts), IN, generator=generator, dtype=torch.float64).to(dtype)


@every_case("biased", [False, True])
@every_case(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_equals_the_formula_of_every_expert(dtype: torch.dtype, bound: float, biased: bool) -> None:
    parts = layer(dtype, biased=biased)
    for counts in ROUTINGS:
        x = inputs(counts, dtype)
        assert_close(found(parts, x, counts), expected(parts, x, counts), bound)


@every_case("biased", [False, True])
@every_case("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout(dtype: torch.dtype, biased: bool) -> None:
    parts, counts = layer(dtype, biased=biased), ROUTINGS[0]
    x = inputs(counts, dtype)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) >= DROPOUT
    # A rounding for each product and its sum, of x and of what is left of it, forward and back.
    bound = rounding(dtype, 4 * (IN + OUT + DIM))
    assert_close(found(parts, x, counts, keep=keep), expected(parts, x, counts, keep), bound)
    assert_apart(expected(parts, x, counts, keep)["y"], expected(parts, x, counts)["y"])


@every_case("dim", [1, 3, 8, 12])
@every_case("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_rank(dim: int, dtype: torch.dtype) -> None:
    """A grouped product of 16 bits takes rows of 16 bytes alone, so other ranks are padded."""
    parts, counts = layer(dtype, dim=dim), ROUTINGS[0]
    x = inputs(counts, dtype)
    assert_close(found(parts, x, counts), expected(parts, x, counts), 1e-13 if dtype is torch.float64 else 2e-2)


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    parts, counts = layer(torch.float64), ROUTINGS[1]
    results = found(parts, inputs(counts, torch.float64), counts)
    for name in ("d lora_a", "d lora_b", "d magnitude"):
        assert [bool(of_expert.any()) for of_expert in results[name]] == [count > 0 for count in counts], name


def test_rows_that_pad_an_experts_tokens_take_no_part() -> None:
    """FP8 needs multiples of tokens for each expert: rows of zeros, whose gradients are zero as well."""
    parts, counts, padded = layer(torch.float64), [3, 0, 5, 1, 2, 4], [4, 0, 8, 4, 4, 4]
    x = inputs(counts, torch.float64)
    is_token = torch.cat([torch.arange(wide) < count for count, wide in zip(counts, padded, strict=True)])
    leaves = {name: parts[name].detach().requires_grad_() for name in ("lora_a", "lora_b", "magnitude")}
    scale = row_scale(parts["magnitude"], norms(parts), torch.float64)
    operands = SiteOperands(leaves["lora_a"], leaves["lora_b"], leaves["magnitude"], scale)
    with_padding = (
        torch.zeros(sum(padded), IN, dtype=torch.float64).masked_scatter(is_token[:, None], x).requires_grad_()
    )
    y = grouped_adapted_linear(
        with_padding,
        base_output(parts, with_padding, padded),
        None,
        torch.tensor(padded, dtype=torch.int32),
        operands,
        torch.tensor([SCALING], dtype=torch.float64),
    )
    assert not y[~is_token].any()
    results = _with_gradients(y[is_token], {"x": with_padding, **leaves})
    assert not results["d x"][~is_token].any()
    results["d x"] = results["d x"][is_token]
    assert_close(results, expected(parts, x, counts), 1e-13)


def test_gradients_by_differences() -> None:
    parts, counts = layer(torch.float64, experts=3), [2, 0, 3]
    ends, n = torch.tensor(counts).cumsum(0, dtype=torch.int32), norms(parts)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        operands = SiteOperands(a, b, m, row_scale(m, n, torch.float64))
        scaling = torch.tensor([SCALING], dtype=torch.float64)
        return grouped_adapted_linear(
            x, base_output(parts, x, counts), None, torch.tensor(counts, dtype=torch.int32), operands, scaling
        )

    operands = [inputs(counts, torch.float64), parts["lora_a"], parts["lora_b"], parts["magnitude"]]
    operands = [each.clone().requires_grad_() for each in operands]
    assert torch.autograd.gradcheck(function, operands, fast_mode=True)
    x, a = operands[0], operands[1]
    assert torch.autograd.gradcheck(lambda x, a: grouped_products.grouped_product(x, a, ends), (x, a), fast_mode=True)


def test_the_ops_are_what_they_promise_compilers() -> None:
    """Their shapes on fake tensors, their gradients, and the library's product beside plain ones."""
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    for dtype in (torch.float64, torch.bfloat16):
        x, y, matrices = (torch.randn(*shape).to(dtype) for shape in ((12, 16), (12, 8), (3, 16, 8)))
        torch.library.opcheck(grouped_products._grouped_product, (x.requires_grad_(), matrices.requires_grad_(), ends))
        torch.library.opcheck(grouped_products._grouped_outer_product, (x.detach(), y, ends))
        product = grouped_products._grouped_product(x, matrices, ends)
        assert_close(product, grouped_products.products_one_by_one(x, matrices, ends), rounding(dtype, 16))
        outer = grouped_products._grouped_outer_product(x.detach(), y, ends)
        assert_close(outer, grouped_products.outer_products_one_by_one(x, y, ends), rounding(dtype, 16))


def test_one_graph_for_every_routing() -> None:
    """Counts are data: 20 routings of four lengths share the graphs of two lengths."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(gm: Any, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    parts, compiled = layer(torch.float64), torch.compile(grouped_adapted_linear, fullgraph=True, backend=counting)
    generator = torch.Generator().manual_seed(1)
    for number in range(20):
        tokens = [30, 12, 17, 44][number % 4]
        counts = torch.bincount(torch.randint(0, 6, (tokens,), generator=generator), minlength=6).tolist()
        x = inputs(counts, torch.float64)
        results = found(parts, x, counts, compiled)
        assert_close(results, found(parts, x, counts), 1e-14)
    assert len(graphs) <= 2


@pytest.mark.slow
@every_case("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_by_inductor(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    parts, compiled = layer(dtype, biased=True), torch.compile(grouped_adapted_linear, fullgraph=True)
    for counts in ROUTINGS[:3]:
        x = inputs(counts, dtype)
        assert_close(
            found(parts, x, counts, compiled), expected(parts, x, counts), 5e-6 if dtype.itemsize == 4 else 2e-2
        )


@every_case("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_case("block_bytes", [1, 2 * OUT * IN * 16, 32 * 2**20])
def test_norms_of_all_experts(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_bytes: int) -> None:
    """One expert at a time, a few, and all in one batch."""
    monkeypatch.setattr(weight_norm, "_BLOCK_BYTES", block_bytes)
    parts = layer(dtype)
    dense = parts["weight"].double() + SCALING * parts["lora_b"].double() @ parts["lora_a"].double()
    assert_below({"norm": relative_error(norms(parts), dense.norm(dim=2))}, 1e-14 if dtype is torch.float64 else 1e-6)


def test_norms_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of 16 matrices in float32 would take 8 MiB."""
    monkeypatch.setattr(weight_norm, "_BLOCK_BYTES", 2**20)
    generator = torch.Generator().manual_seed(0)
    sizes = {"weight": (16, 256, 512), "lora_a": (16, 4, 512), "lora_b": (16, 256, 4)}
    parts = {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in sizes.items()}
    norms(parts)
    assert peak_bytes(lambda: norms(parts), "cpu") < 3 * 2**20


def test_the_comparisons_notice_a_neighbours_scale() -> None:
    parts, counts = layer(torch.float64), ROUTINGS[0]
    other = {**parts, "magnitude": parts["magnitude"].roll(1, 0)}
    x = inputs(counts, torch.float64)
    assert_apart(found(other, x, counts)["y"], expected(parts, x, counts)["y"])
