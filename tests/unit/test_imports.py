"""The package is layered: no file and no folder imports, even inside a function, what imports it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.import_graph import (
    PICTURE,
    drawing,
    folder_graph,
    import_graph,
    imported,
    source_files,
    with_current_drawing,
    without_shortcuts,
)


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


def test_a_module_asked_of_its_package_is_a_circle():
    # As where the package imports one of its modules, which asks the package for another one.
    modules = {name: Path() for name in ("package", "package.one", "package.two")}
    sources = {
        "package": "from package.one import function",
        "package.one": "def function():\n    from package import two",
        "package.two": "",
    }
    graph = {name: set(imported(ast.parse(source), modules)) for name, source in sources.items()}
    assert graph["package.one"] == {"package", "package.two"}
    with pytest.raises(pytest.fail.Exception, match=r"package\.one -> package"):
        assert_no_circle(graph)
    sources["package.one"] = "from package.two import other"
    assert_no_circle({name: set(imported(ast.parse(source), modules)) for name, source in sources.items()})


def test_the_documents_show_the_imports_as_they_are():
    page = PICTURE.read_text(encoding="utf-8")
    assert page == with_current_drawing(page), "python -m tests.import_graph draws docs/architecture.md anew"


def test_an_import_that_is_not_drawn_is_noticed():
    graph = folder_graph(import_graph(), source_files())
    more = {**graph, "dora_fx.files": graph["dora_fx.files"] | {"dora_fx.ranks"}}
    assert "files --> ranks" not in drawing(graph)
    assert "files --> ranks" in drawing(more)


def test_arrows_that_follow_from_others_are_left_out():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"a", "d"}}
    assert without_shortcuts(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"a"}}
