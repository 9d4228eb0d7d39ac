"""Who imports whom in the package; `python -m tests.import_graph` draws the picture of it in the documents anew."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.md"

# They import everything, or are imported by nearly everything, and so would say nothing in the picture.
_LEFT_OUT = ("dora_fx", "dora_fx.app", "dora_fx.quiet_imports", "dora_fx.version")
# Folders of rooms; files beside the rooms are known by their names.
_HOUSES = ("dora_fx", "dora_fx.app")
_BLOCK = re.compile(r"(?<=<!-- drawn by tests/import_graph.py -->\n)```mermaid\n.*?^```$", re.DOTALL | re.MULTILINE)


def source_files() -> dict[str, Path]:
    """Every module's file by its name; those of the passes lie beside the package, behind a link."""
    files = {}
    for folder, package in ((ROOT / "dora_fx", "dora_fx"), (ROOT / "passes", "dora_fx.passes")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


def imported(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a source imports at its top or inside a function.

    `from package import module` is an import of both: it asks the package, which may be in the middle of importing the
    source and not have the module yet.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            yield node.module
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name in modules)


def import_graph() -> dict[str, set[str]]:
    """Every module with those that it imports."""
    modules = source_files()
    return {name: set(imported(ast.parse(path.read_text()), modules)) for name, path in modules.items()}


def room_of(name: str) -> str:
    """The room that a module is in as others see it; of a file beside the rooms, the file."""
    parts = name.split(".")
    house = max((house for house in _HOUSES if f"{name}.".startswith(f"{house}.")), key=len)
    return ".".join(parts[: house.count(".") + 2])


def past_faces(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a file inside another room, where the room's `__init__` alone should be known."""
    return sorted(
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if room_of(name) != room_of(target) != target
    )


def folder_graph(graph: Mapping[str, set[str]], modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Every folder with those that its files import from; files beside the folders stand for themselves."""

    def folder(name: str) -> str:
        is_package = modules[name].name == "__init__.py"
        package = name if is_package else name.rpartition(".")[0]
        return package if package not in _HOUSES or is_package else name

    folders: dict[str, set[str]] = {}
    for name, targets in graph.items():
        folders.setdefault(folder(name), set()).update(folder(target) for target in targets)
    return {name: targets - {name} for name, targets in folders.items()}


def without_shortcuts(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The least graph without circles in which the same nodes reach each other: its transitive reduction."""
    reached: dict[str, set[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        targets = graph.get(name, set())
        reached[name] = targets.union(*(reached[target] for target in targets))
    return {
        name: {target for target in targets if not any(target in reached[other] for other in targets)}
        for name, targets in graph.items()
    }


def drawing(graph: Mapping[str, set[str]]) -> str:
    """Mermaid text of the rooms and the files beside them, an arrow from each to what it imports."""
    rooms = {name: targets.difference(_LEFT_OUT) for name, targets in graph.items() if name not in _LEFT_OUT}
    modules = source_files()

    def node(name: str) -> str:
        room = name.removeprefix("dora_fx.").replace(".", "/")
        return f'{room}["{room}{"/" if modules[name].name == "__init__.py" else ".py"}"]'

    lines = [f"    {node(name)}" for name in sorted(rooms)]
    for name, targets in sorted(without_shortcuts(rooms).items()):
        lines += [
            f"    {node(name).partition('[')[0]} --> {node(target).partition('[')[0]}" for target in sorted(targets)
        ]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def with_current_drawing(page: str) -> str:
    """The text of the page with the picture of the sources as they are."""
    text = drawing(folder_graph(import_graph(), source_files()))
    page, drawn = _BLOCK.subn(lambda _: text, page)
    assert drawn == 1, f"{PICTURE} has {drawn} places for the picture"
    return page


if __name__ == "__main__":
    PICTURE.write_text(with_current_drawing(PICTURE.read_text(encoding="utf-8")), encoding="utf-8")
