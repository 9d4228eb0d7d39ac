"""A table of cases tries each, and names each that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TABLE = """
import pytest
from tests.tables import every_case

@pytest.fixture
def made(tmp_path):
    (tmp_path / "made").mkdir()
    return tmp_path / "made"

@pytest.mark.parametrize("outer", [1, 2])
@every_case(("number", "text"), [(1, "one"), (2, "two"), (3, "three")])
@every_case("factor", [1, 7], ids=["single", "sevenfold"])
def test_all(number, text, factor, outer, made, tmp_path, monkeypatch, capsys):
    assert list(tmp_path.iterdir()) == [made] and not list(made.iterdir())
    (made / text).touch()
    import os
    assert "OF_A_CASE" not in os.environ
    monkeypatch.setenv("OF_A_CASE", text)
    print(text)
    assert outer != 2 or number * factor not in (2, 21), "found a wrong product"
    assert capsys.readouterr().out == f"{text}\\n"
"""


def test_every_case_is_tried_and_each_failure_is_named(pytester: pytest.Pytester) -> None:
    root = Path(__file__).parents[2]
    pytester.makepyfile(TABLE)
    pytester.makeini(f"[pytest]\npythonpath = {root}\n")
    result = pytester.runpytest("-p", "no:cacheprovider", "-n", "0")
    result.assert_outcomes(passed=1, failed=3)
    failed = [line.split(" ")[0] for line in result.outlines if line.startswith("SUBFAILED")]
    assert failed == ["SUBFAILED[2-two-single]", "SUBFAILED[3-three-sevenfold]"]
