"""The benchmarks' harness tells a quiet machine from a noisy one, by a clock that the test turns."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import measuring

REFERENCE = "LoRA"


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Callable[[], None]]:
    """Return a maker of functions that take some seconds, give or take a part of them."""
    draw, now = random.Random(0), [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def make(seconds: float, noise: float) -> Callable[[], None]:
        def function() -> None:
            now[0] += seconds * (1 + noise * draw.uniform(-1, 1))

        return function

    return make


def compare(make: Callable[[float, float], Callable[[], None]], noise: float, control: float = 1.0):
    seconds = {REFERENCE: 1.0, measuring.CONTROL: control, "DoRA": 1.25}
    functions = {name: make(value, noise) for name, value in seconds.items()}
    return measuring.compare(functions, REFERENCE, "cpu", rounds=7, max_rounds=28)


def test_quiet(taking) -> None:
    found = compare(taking, noise=0.001)
    assert found.held and found.rounds == 7
    row = found.table["DoRA"]
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["ratio"] == pytest.approx(1.25, rel=0.002)


def test_rounds_go_on_until_the_control_holds(taking) -> None:
    found = compare(taking, noise=0.016)
    assert found.held and 7 < found.rounds <= 28


@pytest.mark.parametrize(("noise", "control"), [(0.3, 1.0), (0.001, 1.03)])
def test_noisy_or_unfair(taking, noise: float, control: float, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(taking, noise, control)
    assert not found.held and found.rounds == 28
    measuring.show(found, REFERENCE)
    assert "DID NOT HOLD" in capsys.readouterr().out
