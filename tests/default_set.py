"""Choose the tests that a plain run takes; `tests/rotation.txt` lists the others, which are left to the rotation of CI.

    python -m pytest -m "not slow or rotation" --costs costs.jsonl    # CI records the same
    python -m tests.default_set costs.jsonl

The default set is the cheapest that reaches every `raise` statement and calls every public name that any test does. To
that come the tests that are marked `default` by hand, those that notice planted faults among them, and then, cheapest
first, one case of each test function and after that all others, while their CPU seconds stay within the budget.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROTATION = Path(__file__).with_name("rotation.txt")
_HEADER = (
    "# Chosen by tests/default_set.py: tests that a plain run leaves to CI's rotation, without those that have a +."
)


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
    """The last cost of each test in files that `--costs` wrote, with all that it reached in any of them."""
    costs: dict[str, Cost] = {}
    for file in files:
        for line in file.read_text().splitlines():
            found = json.loads(line)
            known = costs.get(found["test"])
            # Older Pythons record nothing that is reached.
            reached = frozenset(found["reached"]) | (known.reached if known else frozenset())
            costs[found["test"]] = Cost(found["test"], found["cpu"], reached, found["default"])
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


def functions_of(file: str) -> set[str]:
    """The names of the functions of a file of tests; none if the file is gone."""
    path = ROTATION.parents[1] / file
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@dataclass(frozen=True)
class Rotation:
    """The tests that a plain run leaves out: functions with all their cases but those in `kept`, and single cases."""

    left: frozenset[str]
    kept: frozenset[str]

    def __contains__(self, test: str) -> bool:
        return test in self.left or (function_of(test) in self.left and test not in self.kept)

    @classmethod
    def of_others(cls, costs: Iterable[Cost], chosen: Iterable[Cost]) -> Rotation:
        """All tests but the chosen ones, in as few names as they take."""
        names = {cost.test for cost in chosen}
        cases: dict[str, list[str]] = {}
        for cost in costs:
            cases.setdefault(cost.function, []).append(cost.test)
        left, kept = set(), set()
        for function, tests in cases.items():
            ours = names.intersection(tests)
            if len(ours) + 1 < len(tests) - len(ours) or not ours:
                left.add(function)
                kept |= ours
            else:
                left.update(set(tests) - ours)
        return cls(frozenset(left), frozenset(kept))

    @classmethod
    def read(cls) -> Rotation:
        """The one in `tests/rotation.txt`: under each file its tests, with a + before those that are kept."""
        left, kept, file = set(), set(), ""
        for line in ROTATION.read_text().splitlines():
            name = line.strip()
            if name == line:
                file = line
            elif name.startswith("+"):
                kept.add(f"{file}::{name[1:]}")
            else:
                left.add(f"{file}::{name}")
        return cls(frozenset(left), frozenset(kept))

    def text(self) -> str:
        """The file's content."""
        lines, file = [_HEADER], ""
        for name in sorted(self.left | self.kept):
            if name.partition("::")[0] != file:
                file = name.partition("::")[0]
                lines.append(file)
            lines.append(f"  {'+' if name in self.kept else ''}{name.partition('::')[2]}")
        return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("costs", type=Path, nargs="+", help="what --costs wrote")
    parser.add_argument("--budget", type=float, default=430.0, help="CPU seconds of the tests alone, without imports")
    arguments = parser.parse_args()
    functions = functools.cache(functions_of)
    # What CI recorded of earlier commits may be gone.
    costs = [
        cost
        for cost in read_costs(arguments.costs)
        if cost.function.partition("::")[2] in functions(cost.test.partition("::")[0])
    ]
    chosen = choose(costs, arguments.budget)
    ROTATION.write_text(Rotation.of_others(costs, chosen).text())
    seconds, all_seconds = (sum(cost.cpu for cost in some) for some in (chosen, costs))
    reached = frozenset().union(*(cost.reached for cost in chosen))
    print(
        f"{len(chosen)} of {len(costs)} tests, {seconds:.0f} of {all_seconds:.0f} CPU seconds, {len(reached)} reached"
    )


if __name__ == "__main__":
    main()
