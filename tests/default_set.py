"""Choose the tests that a plain run takes; `tests/rotation.txt` lists the others, which are left to the rotation of CI.

    python -m pytest -m "not slow or rotation" --costs costs.jsonl    # CI records the same
    python -m tests.default_set costs.jsonl

The default set is the cheapest that reaches every `raise` statement and calls every public name that any test does. To
that come the tests that are marked `default` by hand, those that notice planted faults among them, and then, cheapest
first, one case of each test function and after that all others, while their CPU seconds stay within the budget.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROTATION = Path(__file__).with_name("rotation.txt")
_HEADER = "# Chosen by tests/default_set.py from the recorded costs: tests that a plain run leaves to CI's rotation.\n"


@dataclass(frozen=True)
class Cost:
    """One test: its name, its CPU seconds, what of the package it reaches, and whether it stays by hand."""

    test: str
    cpu: float
    reached: frozenset[str]
    stays: bool

    @property
    def function(self) -> str:
        return function_of(self.test)


def function_of(test: str) -> str:
    """The name of a test without its case."""
    return test.partition("[")[0]


def read_costs(files: Iterable[Path]) -> list[Cost]:
    """The last cost of each test in files that `--costs` wrote."""
    costs = {}
    for file in files:
        for line in file.read_text().splitlines():
            found = json.loads(line)
            costs[found["test"]] = Cost(found["test"], found["cpu"], frozenset(found["reached"]), found["default"])
    return list(costs.values())


def choose(costs: Iterable[Cost], budget: float) -> list[Cost]:
    """The default set; over the budget only where what must be reached costs more."""
    costs = sorted(costs, key=lambda cost: cost.cpu)
    chosen = {cost.test: cost for cost in costs if cost.stays}
    missing = frozenset().union(*(cost.reached for cost in costs)).difference(*(c.reached for c in chosen.values()))
    while missing:
        # A hundredth of a second for what took none, so that tests that reach much come first.
        best = max(costs, key=lambda cost: len(cost.reached & missing) / (cost.cpu + 0.01))
        chosen[best.test] = best
        missing -= best.reached
    spent = sum(cost.cpu for cost in chosen.values())
    for cost in (*_cheapest_cases(costs, {cost.function for cost in chosen.values()}), *costs):
        if cost.test not in chosen and spent + cost.cpu <= budget:
            chosen[cost.test] = cost
            spent += cost.cpu
    return list(chosen.values())


def _cheapest_cases(costs: Iterable[Cost], functions: Iterable[str]) -> Iterator[Cost]:
    """The first case of each function but these."""
    seen = set(functions)
    for cost in costs:
        if cost.function not in seen:
            seen.add(cost.function)
            yield cost


def rotation_text(costs: Iterable[Cost], chosen: Iterable[Cost]) -> str:
    """The list of the others: a function of which no case is chosen, else a case, on each line."""
    kept = {cost.test for cost in chosen}
    functions = {function_of(test) for test in kept}
    left = {cost.test if cost.function in functions else cost.function for cost in costs if cost.test not in kept}
    return _HEADER + "".join(f"{name}\n" for name in sorted(left))


def read_rotation() -> frozenset[str]:
    """The names of functions and cases that a plain run leaves out."""
    return frozenset(line for line in ROTATION.read_text().splitlines() if not line.startswith("#"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("costs", type=Path, nargs="+", help="what --costs wrote")
    parser.add_argument("--budget", type=float, default=430.0, help="CPU seconds of the tests alone, without imports")
    arguments = parser.parse_args()
    costs = read_costs(arguments.costs)
    chosen = choose(costs, arguments.budget)
    ROTATION.write_text(rotation_text(costs, chosen))
    seconds, all_seconds = (sum(cost.cpu for cost in some) for some in (chosen, costs))
    reached = frozenset().union(*(cost.reached for cost in chosen))
    print(
        f"{len(chosen)} of {len(costs)} tests, {seconds:.0f} of {all_seconds:.0f} CPU seconds, {len(reached)} reached"
    )


if __name__ == "__main__":
    main()
