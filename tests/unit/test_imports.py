"""The package is layered: no file and no folder imports, even inside a function, what imports it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from tests.import_graph import (
    PICTURE,
    drawing,
    folder_graph,
    import_graph,
    imported,
    past_faces,
    room_of,
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
    assert "dora_fx.function" in graph["dora_fx.modules.marker"]
    assert "dora_fx.passes.dora_sites" in graph["dora_fx.passes.rewrite_dora_pass"]
    assert_no_circle(graph)


def test_no_folder_imports_in_a_circle():
    graph = folder_graph(import_graph(), source_files())
    assert "dora_fx.function" in graph["dora_fx.modules"]
    assert_no_circle(graph)


def test_rooms_know_each_other_by_their_faces():
    assert past_faces(import_graph()) == []


def test_an_import_past_a_face_is_noticed():
    graph = import_graph()
    graph["dora_fx.attach.plan"].add("dora_fx.modules.adapter")
    # A room inside a room is no door of it.
    graph["dora_fx.attach.plan"].add("dora_fx.modules.kinds")
    assert past_faces(graph) == [
        "dora_fx.attach.plan imports dora_fx.modules.adapter",
        "dora_fx.attach.plan imports dora_fx.modules.kinds",
    ]


def test_no_face_hides_a_file_of_its_room():
    # `import room.name` and `from room import name` would be two things.
    files = source_files()
    for name, path in files.items():
        if path.name == "__init__.py" and name != "dora_fx":
            exported = getattr(import_module(name), "__all__", [])
            assert not [one for one in exported if f"{name}.{one}" in files], name


def test_names_of_files_and_rooms_stand_once():
    # The faces have no names of their own; the command's sub-commands are called as their users call them.
    stems = Counter(name.rpartition(".")[2] for name in source_files() if not name.startswith("dora_fx.app.cli."))
    assert [stem for stem, count in stems.items() if count > 1] == []


def test_the_library_imports_nothing_of_the_command():
    graph = import_graph()
    library = {name: targets for name, targets in graph.items() if not name.startswith("dora_fx.app")}
    assert [name for name, targets in library.items() if any(one.startswith("dora_fx.app") for one in targets)] == []
    assert room_of("dora_fx.app.training.trainer") == "dora_fx.app.training"


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
    more = {**graph, "dora_fx.megatron": graph["dora_fx.megatron"] | {"dora_fx.files"}}
    assert "megatron --> files" not in drawing(graph)
    assert "megatron --> files" in drawing(more)


def test_arrows_that_follow_from_others_are_left_out():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"a", "d"}}
    assert without_shortcuts(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"a"}}
