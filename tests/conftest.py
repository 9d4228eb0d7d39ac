"""Fixtures and options of every test, who runs which tests, and the tables of errors at the end of a run."""

from __future__ import annotations

import argparse
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_fx.megatron.world import megatron_world
from tests.closeness import MARGINS
from tests.costs import CostsRecorder
from tests.default_set import Rotation
from tests.emulated_te import processes_with_emulated_te
from tests.processes import collect_seldom

ErrorKey = tuple[str, str, str]
ERRORS = pytest.StashKey[dict[ErrorKey, float]]()
# Memory for more is not to be expected: each imports everything, and so do the ranks that its tests start.
MOST_WORKERS = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", action="store_true", help="print how near each test came to the bound of its errors")
    parser.addoption("--simdlen", type=int, help="bits of the vectors in Inductor's kernels; 1 for none")
    parser.addoption(
        "--transformer-engine",
        metavar="FOLDER",
        help="with the packages of .ci/emulated_te.txt, for tests of its layers",
    )
    parser.addoption(
        "--slow-share", metavar="I/N", type=share_of, help="the default set, and the I-th of N parts of all other tests"
    )
    parser.addoption("--costs", metavar="FILE", type=Path, help="append what each test costs and reaches")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ERRORS] = {}
    if config.getoption("simdlen") is not None:
        torch._inductor.config.cpp.simdlen = config.getoption("simdlen")
    if config.getoption("slow_share") is not None:
        config.option.markexpr = ""
    costs = config.getoption("costs")
    # Under pytest-xdist the workers run the tests, and not this process.
    if costs is not None and (hasattr(config, "workerinput") or not config.getoption("numprocesses", 0)):
        config.pluginmanager.register(CostsRecorder(costs.absolute()))
    if os.environ.get("EXPECTTEST_ACCEPT") and config.getoption("numprocesses", None):
        raise pytest.UsageError("EXPECTTEST_ACCEPT: several processes would write the same files, expected -n 0")
    # The tensors of these tests are too small to share among threads; on a busy machine threads cost tenfold.
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process per core for whole folders; files and single tests are over before other processes have imported."""
    if not names_folders(config) or os.environ.get("EXPECTTEST_ACCEPT"):
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def names_folders(config: pytest.Config) -> bool:
    """Whether a run takes whole folders, and so the default set of their tests."""
    return all(Path(argument).is_dir() for argument in config.args)


def share_of(text: str) -> tuple[int, int]:
    """The I and N of an option's I/N, I below N."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected I/N with I from 0 to N - 1")
    return int(part), int(parts)


def pytest_collection_finish() -> None:
    collect_seldom()


def pytest_unconfigure() -> None:
    # The interpreter ends without what is frozen, and extensions report it as leaked.
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Before pytest leaves out what is marked slow.
    if names_folders(config):
        rotation = Rotation.read()
        for item in items:
            if item.nodeid in rotation:
                item.add_marker(pytest.mark.rotation)
                item.add_marker(pytest.mark.slow)
    if config.getoption("slow_share") is None:
        return
    part, parts = config.getoption("slow_share")
    # Neighbours are alike, and alike in the time they take.
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = {item for number, item in enumerate(slow) if number % parts != part}
    config.hook.pytest_deselected(items=list(others))
    items[:] = [item for item in items if item not in others]


@pytest.fixture(autouse=True)
def fresh_torch_state() -> Iterator[None]:
    """Start every test from the same seed and without compiled code, and leave none behind."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Megatron warns about every option that a CPU run leaves off.
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        yield
    torch._dynamo.reset()


@pytest.fixture
def world() -> Iterator[None]:
    """A Megatron world of this one process, on CPU."""
    with megatron_world():
        yield


@pytest.fixture(scope="module")
def emulated_te(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes that a module's tests start have Transformer Engine's own Python, with emulated kernels."""
    folder = request.config.getoption("transformer_engine")
    if folder is None:
        pytest.skip("needs --transformer-engine=FOLDER with Transformer Engine's Python, see CONTRIBUTING.md")
    with processes_with_emulated_te(str(Path(folder).resolve(strict=True))):
        yield


@pytest.fixture
def record_error(request: pytest.FixtureRequest) -> Callable[[str, str, torch.dtype, float], None]:
    """Return a function that enters one relative error into the table at the end of the run."""
    errors = request.config.stash[ERRORS]

    def record(layer: str, compiler: str, dtype: torch.dtype, error: float) -> None:
        key = (layer, compiler, str(dtype).removeprefix("torch."))
        errors[key] = max(error, errors.get(key, 0.0))

    return record


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what this process found to the one that prints it."""
    sent = getattr(session.config, "workeroutput", None)
    if sent is not None:
        sent.update(errors=session.config.stash[ERRORS], margins=MARGINS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker found; one that crashed has sent nothing."""
    sent = getattr(node, "workeroutput", {})
    for found, table in ((sent.get("errors"), node.config.stash[ERRORS]), (sent.get("margins"), MARGINS)):
        for key, error in (found or {}).items():
            table[key] = max(error, table.get(key, 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("margins"):
        terminalreporter.section("largest error over its bound")
        for test, margin in sorted(MARGINS.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{margin:.1e}  {test}")
    errors = config.stash[ERRORS]
    if not errors:
        return
    columns = sorted({(compiler, dtype) for _, compiler, dtype in errors}, key=lambda c: (c[1], c[0]))
    layers = list(dict.fromkeys(layer for layer, _, _ in errors))
    rows = [["layer", *(f"{compiler} {dtype}" for compiler, dtype in columns)]]
    for layer in layers:
        found = [errors.get((layer, *column)) for column in columns]
        rows.append([layer, *("-" if error is None else f"{error:.1e}" for error in found)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    terminalreporter.section("largest relative error against the oracle")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
