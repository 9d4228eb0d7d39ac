"""The norm of a layer's input against the oracle's, on tensors alone."""

from __future__ import annotations

import torch

from dora_fx.function.input_norm import InputNorm, normalise
from tests import reference
from tests.closeness import assert_close, rounding
from tests.tables import every_case

FEATURES = 48
NORMS = [(name, centered) for name in ("RMSNorm", "LayerNorm") for centered in (False, True)]


def norm_and_input(name: str, centered: bool, dtype: torch.dtype) -> tuple[InputNorm, torch.Tensor]:
    bias = torch.randn(FEATURES).to(dtype) if name == "LayerNorm" else None
    norm = InputNorm(torch.randn(FEATURES).mul(0.3).to(dtype), bias, name, 1e-5, centered)
    # With a mean, which only one of the norms takes off.
    return norm, (torch.randn(5, 3, FEATURES) + 0.5).to(dtype)


def expected(x: torch.Tensor, norm: InputNorm) -> torch.Tensor:
    bias = None if norm.bias is None else norm.bias.double()
    return reference.normalised(
        x, norm.name, norm.weight.double(), bias, eps=norm.eps, zero_centered=norm.zero_centered
    )


@every_case("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_case(("name", "centered"), NORMS)
def test_equals_the_oracle(name, centered, dtype):
    norm, x = norm_and_input(name, centered, dtype)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, target = normalise(x, norm), expected(wide, norm)
    assert y.dtype is dtype
    weights = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    (y * weights).sum().backward()
    (target * weights.double()).sum().backward()
    # Inside, sums over the features in float32 or float64; the result is rounded once, and so is its gradient.
    inside = rounding(torch.promote_types(dtype, torch.float32), FEATURES + 10)
    assert_close({"y": y, "dx": x.grad}, {"y": target, "dx": wide.grad}, max(inside, rounding(dtype, 2)))


@every_case("dtype", [torch.bfloat16, torch.float16])
@every_case(("name", "centered"), NORMS)
def test_rounds_once(name, centered, dtype):
    norm, x = norm_and_input(name, centered, dtype)
    exact = expected(x.double(), norm)
    # In 16 bits 1 + gamma, or the product with it, would be rounded by itself; a float32 error may tip a tie.
    differs = (normalise(x, norm) != exact.to(dtype)).double().mean()
    assert differs < 0.01


@every_case("dtype", [torch.float32, torch.bfloat16])
@every_case(("name", "centered"), NORMS)
def test_compiled_whole(name, centered, dtype):
    norm, x = norm_and_input(name, centered, dtype)
    compiled = torch.compile(normalise, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, norm), normalise(x, norm), rtol=0, atol=0)
