"""The factored row norm against the dense one in float64, where it is easy and where it is hard."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measuring import peak_bytes
from dora_fx.function import weight_norm
from dora_fx.function.weight_norm import norm_dtype, norm_of_terms, norm_terms
from tests.closeness import note_margin
from tests.tables import every_case

SCALING = 2.0
# Of every row on its own: sixteen units in the last place of the dtype that norms have. The sums are of squares, and
# so are well conditioned where nothing cancels.
TOLERANCE = {torch.float64: 16 * 2**-52, torch.float32: 16 * 2**-23}


def factored(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    dtype = norm_dtype(weight.dtype)
    scaling = torch.tensor([SCALING], dtype=dtype)
    base_norm_sq = weight_norm.base_norm_squared(weight)
    linear_terms, gram = norm_terms(base_norm_sq, weight, lora_a, lora_b, scaling=scaling, dtype=dtype)
    return norm_of_terms(linear_terms, gram, lora_b, scaling=scaling, dtype=dtype)


def assert_rows_close(operands: tuple[torch.Tensor, ...]) -> None:
    """Compare each row's norm with the dense one."""
    found, expected = factored(*operands), dense(*operands)
    error = float(((found.double() - expected) / expected).abs().max())
    note_margin(error, TOLERANCE[found.dtype])
    assert error <= TOLERANCE[found.dtype]


def dense(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    return (weight.double() + SCALING * lora_b.double() @ lora_a.double()).norm(dim=1)


def draw(out: int, features: int, dim: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    weight = torch.randn(out, features) * features**-0.5
    lora_a, lora_b = torch.randn(dim, features) * features**-0.5, torch.randn(out, dim) * 0.3
    return (weight * scale).to(dtype), lora_a.to(dtype), (lora_b * scale).to(dtype)


@every_case("dim", [1, 3, 16, 64, 384, 768])
@every_case("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_rank_and_dtype(dim: int, dtype: torch.dtype) -> None:
    assert_rows_close(draw(70, 130, dim, dtype))


@every_case(
    ("dtype", "scale"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.bfloat16, 1e15),
        (torch.bfloat16, 1e-15),
        # Squares of such weights and of their products are beyond float16, above 65504 and below 6e-8.
        (torch.float16, 2e4),
        (torch.float16, 1e-2),
    ],
    ids=str,
)
def test_huge_and_tiny_weights(dtype: torch.dtype, scale: float) -> None:
    operands = draw(70, 130, 8, dtype, scale)
    assert torch.isfinite(dense(*operands)).all()
    assert_rows_close(operands)


@every_case("remains", [1e-1, 1e-2, 1e-3, 0.0])
def test_near_cancellation_loses_no_more_than_rounding_of_the_base(remains: float) -> None:
    """W0 = (remains - 1) s B A, so that the sum is `remains` of the product."""
    _, lora_a, lora_b = draw(70, 130, 8, torch.float32)
    weight = ((remains - 1.0) * SCALING * lora_b.double() @ lora_a.double()).float()
    found, expected = factored(weight, lora_a, lora_b).double(), dense(weight, lora_a, lora_b)
    assert torch.isfinite(found).all() and (found >= 0).all()
    # Squares are off by some ulps of the base's square, whatever is left of it.
    ulps = (found.square() - expected.square()).abs() / (weight.double().norm(dim=1).square() * 2**-23)
    assert ulps.max() < 16


def test_rows_of_zeros_have_the_norm_of_their_product() -> None:
    weight, lora_a, lora_b = draw(70, 130, 8, torch.float32)
    weight[:3] = 0.0
    lora_b[:2] = 0.0
    found = factored(weight, lora_a, lora_b)
    assert found[:2].tolist() == [0.0, 0.0]
    assert_rows_close((weight[2:], lora_a, lora_b[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_bound_the_memory(dtype: torch.dtype) -> None:
    out, features, dim = 9000, 1200, 512
    operands = draw(out, features, dim, dtype)
    assert peak_bytes(lambda: factored(*operands), "cpu") <= out * dim * 4 + 32 * 2**20
    assert_rows_close(operands)
