"""Tables of cases that are one test: each case is tried, and each that fails is reported with its name."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

Case = tuple[str, dict[str, Any]]


def every_case(
    names: str | Sequence[str], values: Iterable[Any], ids: Iterable[Any] | Callable[[Any], Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try a test with every value in one run of it, in the arguments of `pytest.mark.parametrize`.

    For cheap cases that differ in a text or a value: fixtures are made once for all of them. Each case starts with the
    seed and without the compiled code of others, as a test does, with a `monkeypatch` of its own, and with a `tmp_path`
    of its own that has a copy of what fixtures made there. Where it stands twice, every combination is tried.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [tuple(value) if len(names) > 1 and not isinstance(value, ParameterSet) else (value,) for value in values]
    assert rows, "a table without cases tests nothing"
    assert not any(isinstance(part, ParameterSet) for row in rows for part in row), "marks of cases would be lost"
    labels = labels_of(names, rows, ids)
    cases = [(label, dict(zip(names, row, strict=True))) for label, row in zip(labels, rows, strict=True)]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        body, inner = getattr(test, "table", (test, [("", {})]))
        return table_of(test, body, [(f"{a}-{b}".strip("-"), x | y) for (a, x), (b, y) in product(cases, inner)])

    return decorate


def labels_of(names: Sequence[str], rows: Sequence[tuple[Any, ...]], ids: Any) -> list[str]:
    if ids is not None and not callable(ids):
        return [str(label) for label in ids]

    def text(name: str, value: Any, number: int) -> str:
        if ids is not None:
            return str(ids(value))
        speaks = isinstance(value, str | int | float | None | torch.dtype)
        return str(value) if speaks else getattr(value, "__name__", f"{name}{number}")

    return ["-".join(map(text, names, row, [number] * len(row))) for number, row in enumerate(rows)]


def table_of(test: Callable[..., None], body: Callable[..., None], cases: list[Case]) -> Callable[..., None]:
    """One test of the cases; pytest sees the fixtures that the body takes beside them."""
    assert not inspect.iscoroutinefunction(body), "nobody would await it"
    fixtures = [name for name in inspect.signature(body).parameters if name not in cases[0][1]]

    @functools.wraps(test)
    def run(subtests: pytest.Subtests, tmp_path: Path, **given: Any) -> None:
        if "tmp_path" in fixtures:
            given["tmp_path"] = tmp_path
        num_skipped = 0
        for number, (label, values) in enumerate(cases):
            with subtests.test(label), fresh(given, tmp_path, number) as own:
                try:
                    body(**own, **values)
                except pytest.skip.Exception:
                    num_skipped += 1
                    raise
        if num_skipped == len(cases):
            pytest.skip("every case was skipped")

    names = dict.fromkeys(["subtests", "tmp_path", *fixtures])
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.table = (body, cases)  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def fresh(given: dict[str, Any], folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """The fixtures of one case: what it leaves in a folder, the environment or the output is not for the next one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Beside the folder, so that the first case's is no part of what the second copies.
    copied = shutil.copytree(folder, folder.with_name(f"{folder.name}_case_{number}"))
    own = {name: in_copy(value, folder, copied) for name, value in given.items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        if "monkeypatch" in own:
            own["monkeypatch"] = monkeypatch
        if "capsys" in own:
            own["capsys"].readouterr()
        if "caplog" in own:
            own["caplog"].clear()
        yield own


def in_copy(value: Any, folder: Path, copied: Path) -> Any:
    """The same file or folder in the copy, where a fixture gave one of the folder."""
    is_below = isinstance(value, Path) and value.is_relative_to(folder)
    return copied / value.relative_to(folder) if is_below else value
