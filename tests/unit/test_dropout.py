"""Dropout masks: keep rate, independence, and the same mask whoever compiles."""

from __future__ import annotations

import math

import pytest
import torch

from dora_fx.function import dropout as dora_dropout
from dora_fx.function.dropout import DropoutFactors, draw_dropout_key, dropout
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

TOKENS, FEATURES = 512, 384


def factors(p: float) -> DropoutFactors:
    return DropoutFactors.of(p, torch.float32, "cpu")


def keep_mask(x: torch.Tensor, key: torch.Tensor, p: float, sharded_features: bool) -> torch.Tensor:
    return dora_dropout.keep_mask(x, key, factors(p).threshold, sharded_features)


def mask(p: float, seed: int = 0, *, sharded: bool = False, key: torch.Tensor | None = None) -> torch.Tensor:
    x = torch.empty(TOKENS, FEATURES)
    if key is None:
        torch.manual_seed(seed)
        key = draw_dropout_key(x, "")
    return keep_mask(x, key, p, sharded)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two masks in units of its standard deviation for independent ones."""
    a, b = (part.double().flatten() - part.double().mean() for part in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm())) * math.sqrt(a.numel())


@every_case("p", [0.01, 0.1, 0.5, 0.9])
@every_case("seed", [0, 1, 2])
def test_keep_rate_overall_and_in_every_row_and_column(p: float, seed: int) -> None:
    kept = mask(p, seed).double()
    for part, count in ((kept.mean(), kept.numel()), (kept.mean(0), TOKENS), (kept.mean(1), FEATURES)):
        deviation = (part - (1 - p)).abs().max() / math.sqrt(p * (1 - p) / count)
        assert deviation < 6


@every_case("shift", [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (64, 0), (0, 128)])
def test_neighbours_are_independent(shift: tuple[int, int]) -> None:
    kept = mask(0.3)
    rows, columns = shift
    assert abs(correlation(kept[: TOKENS - rows, : FEATURES - columns], kept[rows:, columns:])) < 5


@every_case("seeds", [(0, 1), (0, 2), (1, 2**31), (5, 2**40)])
def test_calls_are_independent(seeds: tuple[int, int]) -> None:
    first, second = (mask(0.3, seed) for seed in seeds)
    assert abs(correlation(first, second)) < 5


@every_case("other", [(1, 0, 0), (0, 1, 0), (2**31, 0, 0), (0, 2**31, 0)])
def test_keys_that_differ_in_one_bit_are_independent(other: tuple[int, int, int]) -> None:
    zero = mask(0.3, key=torch.zeros(3, dtype=torch.int64))
    assert abs(correlation(zero, mask(0.3, key=torch.tensor(other)))) < 5


def test_pairs_of_rows_are_uncorrelated() -> None:
    """Were a row the shift or the complement of another one, some pair would stand out."""
    kept = mask(0.5).double() - 0.5
    products = (kept @ kept.T) / (0.25 * math.sqrt(FEATURES))
    assert (products - torch.diag(products.diag())).abs().max() < 6.5


def test_consecutive_calls_draw_different_masks_and_one_seed_repeats_them() -> None:
    x = torch.empty(TOKENS, FEATURES)
    torch.manual_seed(4)
    keys = [draw_dropout_key(x, "") for _ in range(2)]
    torch.manual_seed(4)
    again = [draw_dropout_key(x, "") for _ in range(2)]
    assert not torch.equal(keys[0], keys[1])
    assert all(torch.equal(key, other) for key, other in zip(keys, again, strict=True))


def test_sharded_masks_are_slices_of_the_whole_one() -> None:
    whole_x, key = torch.empty(TOKENS, FEATURES), torch.tensor([17, 23, 0])
    whole = keep_mask(whole_x, key, 0.3, sharded_features=True)
    for tp_rank in range(4):
        part_x = whole_x.chunk(4, 1)[tp_rank]
        part = keep_mask(part_x, torch.tensor([17, 23, tp_rank]), 0.3, sharded_features=True)
        assert torch.equal(part, whole.chunk(4, 1)[tp_rank])
    replicated = keep_mask(whole_x, torch.tensor([17, 23, 3]), 0.3, sharded_features=False)
    assert torch.equal(replicated, whole)


def test_mask_depends_on_position_not_on_shape() -> None:
    key = torch.tensor([3, 4, 0])
    flat = keep_mask(torch.empty(6, 10), key, 0.4, False)
    assert torch.equal(keep_mask(torch.empty(2, 3, 10), key, 0.4, False).view(6, 10), flat)
    assert torch.equal(keep_mask(torch.empty(4, 10), key, 0.4, False), flat[:4])


def test_kept_elements_are_scaled_and_the_mean_stays() -> None:
    x = torch.full((TOKENS, FEATURES), 3.0)
    dropped = dropout(x, torch.tensor([1, 2, 0]), *factors(0.25), False)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    deviation = 4.0 * math.sqrt(0.25 * 0.75 / x.numel())
    assert abs(dropped.double().mean() - 3.0) < 5 * deviation


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_draws_the_same_masks_in_the_same_order(backend: str) -> None:
    def several(x: torch.Tensor) -> list[torch.Tensor]:
        # Used in another order than drawn, so that a compiler that draws on demand would swap them.
        keys = [draw_dropout_key(x, "") for _ in range(3)]
        return [keep_mask(x, key, 0.5, False) for key in reversed(keys)]

    x = torch.empty(4, 5)
    torch.manual_seed(9)
    expected = several(x)
    torch.manual_seed(9)
    found = torch.compile(several, backend=backend, fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
