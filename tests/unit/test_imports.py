"""The package is layered: no file and no folder imports, even inside a function, what imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def source_files() -> dict[str, Path]:
    """Every module's file by its name; those of the passes lie beside the package, behind a link."""
    files = {}
    for folder, package in ((ROOT / "dora_fx", "dora_fx"), (ROOT / "passes", "dora_fx.passes")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


def imported(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)


def import_graph() -> dict[str, set[str]]:
    modules = source_files()
    return {name: set(imported(ast.parse(path.read_text()), modules)) for name, path in modules.items()}


def folder_graph(graph: Mapping[str, set[str]], modules: Mapping[str, Path]) -> dict[str, set[str]]:
    def folder(name: str) -> str:
        is_package = modules[name].name == "__init__.py"
        package = name if is_package else name.rpartition(".")[0]
        # Files beside the folders stand for themselves.
        return package if package != "dora_fx" or is_package else name

    folders: dict[str, set[str]] = {}
    for name, targets in graph.items():
        folders.setdefault(folder(name), set()).update(folder(target) for target in targets)
    return {name: targets - {name} for name, targets in folders.items()}


def assert_no_circle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_no_file_imports_in_a_circle():
    graph = import_graph()
    assert "dora_fx.function.formula" in graph["dora_fx.modules.marker"]
    assert "dora_fx.passes.dora_sites" in graph["dora_fx.passes.rewrite_dora_pass"]
    assert_no_circle(graph)


def test_no_folder_imports_in_a_circle():
    graph = folder_graph(import_graph(), source_files())
    assert "dora_fx.function" in graph["dora_fx.modules"]
    assert_no_circle(graph)


def test_a_circle_is_found():
    with pytest.raises(pytest.fail.Exception, match=r"a -> b -> a|b -> a -> b"):
        assert_no_circle({"a": {"b"}, "b": {"a"}})
