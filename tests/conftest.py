"""Fixtures and options of every test, and the tables of errors at the end of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from dora_fx.megatron.world import megatron_world
from tests.closeness import MARGINS

ErrorKey = tuple[str, str, str]
ERRORS = pytest.StashKey[dict[ErrorKey, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", action="store_true", help="print how near each test came to the bound of its errors")
    parser.addoption("--simdlen", type=int, help="bits of the vectors in Inductor's kernels; 1 for none")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ERRORS] = {}
    if config.getoption("simdlen") is not None:
        torch._inductor.config.cpp.simdlen = config.getoption("simdlen")
    # The tensors of these tests are too small to share among threads; on a busy machine threads cost tenfold.
    torch.set_num_threads(1)


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


@pytest.fixture
def record_error(request: pytest.FixtureRequest) -> Callable[[str, str, torch.dtype, float], None]:
    """Return a function that enters one relative error into the table at the end of the run."""
    errors = request.config.stash[ERRORS]

    def record(layer: str, compiler: str, dtype: torch.dtype, error: float) -> None:
        key = (layer, compiler, str(dtype).removeprefix("torch."))
        errors[key] = max(error, errors.get(key, 0.0))

    return record


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
