"""The default set is chosen as it says, and the list of the other tests names tests that there are."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.costs import cpu_seconds_of_tree
from tests.default_set import Cost, Rotation, choose, function_of, functions_of


def cost(test: str, cpu: float, *reached: str, stays: bool = False) -> Cost:
    return Cost(test, cpu, frozenset(reached), stays)


COSTS = [
    cost("a.py::dear", 30.0, "refusal 1", "refusal 2"),
    cost("a.py::cheap[x]", 1.0, "refusal 1"),
    cost("a.py::cheap[y]", 2.0, "refusal 1", "refusal 2"),
    cost("a.py::fault", 50.0, stays=True),
    cost("a.py::numbers[1]", 5.0),
    cost("a.py::numbers[2]", 4.0),
]


def names(costs: list[Cost]) -> set[str]:
    return {one.test.removeprefix("a.py::") for one in costs}


def test_what_is_reached_is_reached_by_the_cheapest():
    assert names(choose(COSTS, budget=0.0)) == {"fault", "cheap[y]"}


def test_the_budget_goes_to_a_case_of_each_function_first():
    assert names(choose(COSTS, budget=56.5)) == {"fault", "cheap[y]", "numbers[2]"}
    assert names(choose(COSTS, budget=92.0)) == names(COSTS)


def test_the_list_names_functions_and_cases():
    chosen = choose(COSTS, budget=56.5)
    rotation = Rotation.of_others(COSTS, chosen)
    assert rotation.text().splitlines()[1:] == ["a.py", "  cheap[x]", "  dear", "  numbers[1]"]
    many = [*COSTS, *(cost(f"a.py::numbers[{case}]", 9.0) for case in range(3, 9))]
    rotation = Rotation.of_others(many, chosen)
    assert rotation.text().splitlines()[1:] == ["a.py", "  cheap[x]", "  dear", "  numbers", "  +numbers[2]"]
    assert {one.test for one in many if one.test not in rotation} == {one.test for one in chosen}


def test_the_tests_in_the_list_are_there():
    functions: dict[str, set[str]] = {}
    rotation = Rotation.read()
    for test in rotation.left | rotation.kept:
        file, _, function = function_of(test).partition("::")
        functions.setdefault(file, set()).add(function)
    for file, found in functions.items():
        missing = found - functions_of(file)
        assert not missing, f"{file}: {missing} of tests/rotation.txt; python -m tests.default_set makes it anew"


def test_the_seconds_of_children_count():
    before = cpu_seconds_of_tree()
    program = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    # Counted in ticks of the clock, for this process and for that one.
    assert cpu_seconds_of_tree() - before >= 0.3 - 2 / os.sysconf("SC_CLK_TCK")
