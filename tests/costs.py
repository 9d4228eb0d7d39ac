"""The CPU seconds of each test, and what of the package it reaches: recorded by `pytest --costs FILE`.

A line of JSON per test: its name, the CPU seconds of its process and of all that it started, whether it is marked
`default`, the `raise` statements of the package that it reached and the public names that it called (both from Python
3.12 on). `tests/default_set.py` reads it.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

import dora_fx

# Processes that tests start append to the file of this name what they reach.
REACHED = "DORA_FX_TESTS_REACHED"
ROOT = Path(__file__).parents[1]
_TOOL = 4


class CostsRecorder:
    """A plugin that appends one line per test to a file; every worker of pytest-xdist has its own."""

    def __init__(self, costs: Path) -> None:
        self._costs = costs
        self._reached = costs.with_name(f"{costs.name}.{os.getpid()}")
        self._reached.touch()
        os.environ[REACHED] = str(self._reached)
        watch()

    def pytest_unconfigure(self) -> None:
        self._reached.unlink(missing_ok=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        os.truncate(self._reached, 0)
        cpu, wall = cpu_seconds_of_tree(), time.monotonic()
        result = yield
        line = {
            "test": item.nodeid,
            "cpu": round(cpu_seconds_of_tree() - cpu, 2),
            "wall": round(time.monotonic() - wall, 2),
            "default": item.get_closest_marker("default") is not None,
            "reached": sorted(set(self._reached.read_text().splitlines())),
        }
        with self._costs.open("a") as costs:
            costs.write(json.dumps(line) + "\n")
        return result


def cpu_seconds_of_tree() -> float:
    """CPU seconds that this process, and every process that it has started or that they have, took so far."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of the program, in parentheses, may contain anything.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    return sum(ticks[pid] for pid in ticks if _descends(pid, os.getpid(), parents)) / os.sysconf("SC_CLK_TCK")


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid != ancestor and pid in parents:
        pid = parents[pid]
    return pid == ancestor


def watch() -> None:
    """Note in the file that the environment names what this process reaches; nothing without such a file.

    Python tells of exceptions and calls at no cost to what does neither, from 3.12 on; before, nothing is noted.
    """
    if REACHED not in os.environ or sys.version_info < (3, 12) or sys.monitoring.get_tool(_TOOL) is not None:
        return
    raises, names = raise_statements(), public_functions()

    # Open from the start, as a test may give up its rights. A write of few bytes at the end of a file is whole.
    reached = os.open(os.environ[REACHED], os.O_WRONLY | os.O_APPEND)

    def note(what: str) -> None:
        os.write(reached, f"{what}\n".encode())

    def raised(code: CodeType, offset: int, error: BaseException) -> None:
        lines = raises.get(code.co_filename)
        if lines is None:
            return
        line = next((line for start, end, line in code.co_lines() if start <= offset < end), None)
        if line in lines:
            # By its place in the function: numbers of lines change with every commit.
            before = {first for first in lines.values() if code.co_firstlineno <= first < lines[line]}
            note(f"{Path(code.co_filename).resolve().relative_to(ROOT)}:{code.co_qualname}:{len(before)}")

    def called(code: CodeType, offset: int) -> None:
        note(names[code])

    monitoring = sys.monitoring
    monitoring.use_tool_id(_TOOL, "tests.costs")
    monitoring.register_callback(_TOOL, monitoring.events.RAISE, raised)
    monitoring.set_events(_TOOL, monitoring.events.RAISE)
    monitoring.register_callback(_TOOL, monitoring.events.PY_START, called)
    for code in names:
        monitoring.set_local_events(_TOOL, code, monitoring.events.PY_START)


def raise_statements() -> dict[str, dict[int, int]]:
    """Path of each file of the package -> the lines of its `raise` statements, each with the statement's first line."""
    package = Path(inspect.getfile(dora_fx)).parent
    found = {}
    for path in package.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
        lines = {line: node.lineno for node in nodes for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        found[str(path)] = lines
    return found


def public_functions() -> dict[CodeType, str]:
    """The code that a call of each public name starts."""
    found = {}
    for name in dora_fx.__all__:
        value = getattr(dora_fx, name)
        function = inspect.unwrap(value.__init__ if isinstance(value, type) else value) if callable(value) else None
        if inspect.isfunction(function):
            found[function.__code__] = f"dora_fx.{name}"
    return found
