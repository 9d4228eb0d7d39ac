"""One measure and one bound for every comparison of numbers that were rounded, so that no processor decides a test.

Errors are relative to the norm of what is expected. Bounds follow from how many roundings lie on the way to a result.
Each is off by half a unit in the last place (eps / 2) of what it rounds, and in whatever order a processor adds, n of
them go together like a random walk: the error stays below l sqrt(n) eps / 2 with a probability of at least
1 - 2 exp(-l^2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput.
41(5), 2019, theorem 2.4). With l = 8 there is room for both sides of a comparison to be off, and for a model that
enlarges an error several times; a fault of the function itself is far outside.

`python -m pytest --margins` prints how near each comparison came to its bound.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

Tensors = torch.Tensor | Mapping[str, torch.Tensor]

# Test -> the largest error over its bound, of the comparisons of this process that have room for an error.
MARGINS: dict[str, float] = {}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, in float64; zero where both are zero everywhere."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).norm()
    return 0.0 if difference == 0.0 else float(difference / expected.norm())


def rounding(dtype: torch.dtype, roundings: int) -> float:
    """The relative error between two computations in `dtype` with that many roundings on the way to each result."""
    return 4.0 * roundings**0.5 * torch.finfo(dtype).eps


def roundings_of(*modules: nn.Module) -> int:
    """How many roundings a model's forward pass has at most on the way to a result.

    The last dimension of every parameter is the length of the sums that it takes part in: a product's, or a norm's.
    Layers beside each other count one after another, which has room for the sums of attention. A backward pass sums
    over the other dimensions and over tokens, and has about twice as many.
    """
    return sum(parameter.shape[-1] for module in modules for parameter in module.parameters() if parameter.dim())


def assert_close(found: Tensors, expected: Tensors, bound: float) -> None:
    """Raise AssertionError, naming each tensor and its error, unless all relative errors are at most `bound`."""
    found = found if isinstance(found, Mapping) else {"tensor": found}
    expected = expected if isinstance(expected, Mapping) else {"tensor": expected}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        # What is expected may come from an oracle.
        assert value.dtype in (found[name].dtype, torch.float64), name
    errors = {name: relative_error(found[name], value) for name, value in expected.items()}
    assert_below(errors, bound)


def assert_below(errors: Mapping[str, float], bound: float) -> None:
    """Raise AssertionError, naming each error that is not at most `bound`."""
    note_margin(max(errors.values(), default=0.0), bound)
    too_large = {name: error for name, error in errors.items() if not error <= bound}
    assert not too_large, f"relative errors above {bound:.1e}: {too_large}"


def assert_as_exact(found: torch.Tensor, other: torch.Tensor, exact: torch.Tensor) -> None:
    """Raise AssertionError if `found` is more than twice as far from `exact` as `other` is.

    For two computations in a dtype so coarse that a bound from the number of roundings would say nothing. Both make
    about the same number of them, and the norm of many independent errors varies little; twice the error is what four
    times as many roundings give.
    """
    assert_below({"found": relative_error(found, exact)}, 2.0 * relative_error(other, exact))


def assert_apart(found: torch.Tensor, other: torch.Tensor, least: float = 0.05) -> None:
    """Raise AssertionError unless the two differ by far more than rounding does, or comparing them says little."""
    difference = relative_error(found, other)
    assert difference >= least, f"the relative difference is {difference:.1e}, expected at least {least}"


def note_margin(error: float, bound: float) -> None:
    """Enter a comparison into `MARGINS`."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    if bound > 0.0:
        MARGINS[test] = max(error / bound, MARGINS.get(test, 0.0))
