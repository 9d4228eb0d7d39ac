"""A described layer as a tree for a terminal: modules around the boxes of each graph, in the order of computation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from torch import fx

from dora_fx.explanation.graph_boxes import Kept
from dora_fx.explanation.layer_description import describe_layer
from dora_fx.explanation.layer_parts import Box, GraphDescription, LayerDescription
from dora_fx.explanation.wording import (
    kept_texts,
    message_text,
    operand_texts,
    ops_text,
    tensor_texts,
    title_of,
    totals_texts,
)

if TYPE_CHECKING:
    from rich.tree import Tree

_STYLES = {"base": "cyan", "dora": "yellow", "input": "default", "output": "default"}
_STYLES |= {"forward": "bold white on magenta", "backward": "magenta", "kept": "green"}


def layer_tree(before: fx.Graph, after: fx.Graph, title: str = "layer", *, kept: Kept | None = None) -> Tree:
    """Return a layer's graphs before and after the passes as a tree; see `describe_layer`.

    Raises:
        ModuleNotFoundError: rich is not installed; it is in the extra `dora-fx[demo]`.
    """
    return tree_of(describe_layer(before, after, title, kept=kept))


def tree_of(layer: LayerDescription) -> Tree:
    """Return a described layer as a tree."""
    # The library works without rich.
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(layer.title, style="bold"))
    for name, graph in (("before the passes", layer.before), ("after the passes", layer.after)):
        totals = ("  " + "; ".join(totals_texts(graph)), "dim")
        branch = tree.add(Text.assemble((name, "bold"), totals))
        readers = _sources(graph)
        for path, boxes in groupby(graph.boxes, key=lambda box: box.site):
            under = branch if path is None else branch.add(Text(path, style="bold dim"))
            for box in boxes:
                _add(under, box, readers[box.name])
    return tree


def _sources(graph: GraphDescription) -> dict[str, list[str]]:
    sources: dict[str, list[str]] = {box.name: [] for box in graph.boxes}
    for edge in graph.edges:
        sources[edge.target].append(edge.source)
    return sources


def _add(tree: Tree, box: Box, sources: Iterable[str]) -> None:
    """Add a box: what it is and what its value is in one line, and below what it reads, sends and keeps."""
    from rich.text import Text

    called_by = f" ({', '.join(sources)})" if box.part != "input" else ""
    title = (title_of(box, "layer"), f"bold {_STYLES[box.part]}")
    of_module = box.path if box.site is None and box.path != title[0] else ""
    notes = "".join(f"  {note}" for note in (of_module, ops_text(box)) if note)
    value = "  " + "; ".join(tensor_texts(box.outputs))
    node = tree.add(Text.assemble((f"{box.name} = ", "dim"), title, (called_by, "dim"), value, (notes, "dim")))
    for names, tensor in operand_texts(box.operands):
        node.add(Text.assemble((names, _STYLES[box.part]), f" {tensor}"))
    for message in box.messages:
        node.add(Text(message_text(message), style=_STYLES[message.when]))
    for text in kept_texts(box):
        node.add(Text(text, style=_STYLES["kept"]))
