"""The comparison that other tests rely on fails where it should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.closeness import assert_apart, assert_as_exact, assert_close, relative_error, rounding, roundings_of
from tests.tables import every_case

VALUE = torch.arange(1.0, 5.0)


def test_errors_are_relative_to_the_norm_of_what_is_expected() -> None:
    for scale in (1e-20, 1.0, 1e15):
        assert relative_error(1.5 * scale * VALUE, scale * VALUE) == pytest.approx(0.5)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")


@every_case(
    "found",
    [
        {"a": VALUE * (1 + 2e-6)},
        {"a": VALUE.index_fill(0, torch.tensor(0), float("nan"))},
        {"a": VALUE.index_fill(0, torch.tensor(0), float("inf"))},
        {"a": VALUE[None]},
        {"a": VALUE.half()},
        {"a": VALUE, "b": VALUE},
        {},
    ],
    ids=["off", "nan", "inf", "shape", "dtype", "more", "fewer"],
)
def test_what_is_not_close(found: dict[str, torch.Tensor]) -> None:
    assert_close({"a": VALUE * (1 + 1e-7)}, {"a": VALUE}, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(found, {"a": VALUE}, 1e-6)


def test_what_is_apart_and_what_is_as_exact() -> None:
    assert_apart(1.1 * VALUE, VALUE)
    with pytest.raises(AssertionError, match=r"expected at least 0\.05"):
        assert_apart(1.01 * VALUE, VALUE)
    assert_as_exact(1.19 * VALUE, 1.1 * VALUE, VALUE)
    with pytest.raises(AssertionError, match="relative errors above"):
        assert_as_exact(1.21 * VALUE, 1.1 * VALUE, VALUE)


def test_a_bound_has_room_for_sums_in_any_order_and_none_for_a_fault() -> None:
    linear = nn.Linear(1024, 64)
    assert roundings_of(linear) == 1024 + 64
    bound = rounding(torch.float32, roundings_of(linear))
    x, weight = torch.randn(32, 1024), linear.weight.detach()
    exact = x.double() @ weight.double().T
    one_by_one = torch.zeros(32, 64)
    for i in range(1024):
        one_by_one += x[:, i, None] * weight[:, i]
    assert_close(one_by_one, exact, bound)
    with pytest.raises(AssertionError):
        assert_close(one_by_one * 1.0001, exact, bound)
