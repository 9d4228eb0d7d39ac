"""Descriptions of layers, their pictures and trees, against the graphs that they are of."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter
from functools import cache
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import fx

from dora_fx.explanation import (
    GraphDescription,
    LayerDescription,
    describe_layer,
    draw,
    layer_tree,
    tree_of,
)
from dora_fx.explanation.collective_calls import is_collective
from dora_fx.explanation.node_values import viewed_maybe
from dora_fx.passes.graph_utils import referenced_graph_maybe
from tests.graph.layer_graphs import LAYERS, LayerGraphs, layer_graphs
from tests.graph.layer_picture import PICTURE, picture

SVG = "{http://www.w3.org/2000/svg}"
TITLE = 'a & b < c > "d"'


@cache
def described(name: str) -> tuple[LayerGraphs, LayerDescription]:
    """The graphs of a layer, and their description."""
    with layer_graphs(name) as graphs:
        before, after = graphs.before[0].graph, graphs.after[0].graph
        return graphs, describe_layer(before, after, TITLE, kept=graphs.kept)


def nodes_of(graph: fx.Graph, prefix: str = "") -> dict[str, fx.Node]:
    """The nodes of a graph and of the checkpoints in it by their names; what hands values over has none of its own."""
    nodes = {}
    for node in graph.nodes:
        if not prefix or node.op not in ("placeholder", "output"):
            nodes[prefix + node.name] = node
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            nodes |= nodes_of(referenced_graph_maybe(node.args[0]).graph, f"{node.args[0]}.")
    return nodes


def contracted(graph: fx.Graph, description: GraphDescription) -> set[tuple[str, str]]:
    """The edges between boxes that follow from the operands of all nodes."""
    box_of = {name: box.name for box in description.boxes for name in box.nodes}
    drawn = {box.name for box in description.boxes}
    of_parameters = {name for name, node in nodes_of(graph).items() if node.op in ("placeholder", "get_attr")} - drawn
    edges = set()
    for name, node in nodes_of(graph).items():
        for operand in node.all_input_nodes:
            source = operand
            while (viewed := viewed_maybe(source)) is not None:
                source = viewed
            if viewed_maybe(node) is None and source.name not in of_parameters:
                edges.add((box_of[source.name], box_of[name]))
    return {(source, target) for source, target in edges if source != target}


@pytest.mark.parametrize("name", LAYERS)
def test_every_node_is_in_one_box(name):
    graphs, description = described(name)
    for graph, side in ((graphs.before[0].graph, description.before), (graphs.after[0].graph, description.after)):
        found = Counter([name for box in side.boxes for name in box.nodes] + list(side.unread))
        assert found == Counter(nodes_of(graph).keys())
        order = {box.name: place for place, box in enumerate(side.boxes)}
        assert len(order) == len(side.boxes)
        assert all(order[edge.source] < order[edge.target] for edge in side.edges)
        reached = {edge.target for edge in side.edges} | {edge.source for edge in side.edges}
        assert reached == order.keys()


@pytest.mark.parametrize("name", ["column", "row_sequence_parallel", "row_with_dropout", "plain_linear", "mlp_half"])
def test_edges_are_those_of_the_graph(name):
    graphs, description = described(name)
    for graph, side in ((graphs.before[0].graph, description.before), (graphs.after[0].graph, description.after)):
        assert {(edge.source, edge.target) for edge in side.edges} == contracted(graph, side)


def test_a_tensor_written_in_place_is_read_after_the_write():
    [core] = [box for box in described("whole_layer")[1].after.boxes if box.path == "self_attention.core_attention"]
    # Nobody reads what the mask's op returns, and the buffer that it is written into has no values before.
    assert core.ops == ("repeat_interleave",) * 2 + ("baddbmm", "masked_fill_", "softmax", "dropout", "bmm")
    assert {"empty", "masked_fill_"} <= {*core.nodes}


@pytest.mark.parametrize("name", LAYERS)
def test_messages_are_those_of_the_compiled_graphs(name):
    graphs, description = described(name)
    for when, graph in (("forward", graphs.forward), ("backward", graphs.backward)):
        told: Counter[tuple[str, int]] = Counter()
        for box in description.after.boxes:
            for message in box.messages:
                if message.when == when:
                    assert message.group_size == 2
                    told[message.kind, message.nbytes] += message.count
        if when == "backward" and "recomputed" in name:
            # What the forward pass sends is sent once more.
            told += message_counts(graphs.forward)
        # Of a graph that is traced without gradients, the description says what they would send.
        assert graph is None or told == message_counts(graph)


def message_of(node: fx.Node) -> tuple[str, int]:
    kind = re.match("all_reduce|all_gather|reduce_scatter", node.target.__name__)[0]
    values = [node.meta["val"], *(operand.meta["val"] for operand in node.all_input_nodes)]
    return kind, max(value.numel() * value.element_size() for value in values)


def message_counts(graph: fx.Graph) -> Counter[tuple[str, int]]:
    return Counter(message_of(node) for node in graph.nodes if is_collective(node.target))


def test_what_the_base_would_compute_too_is_the_bases():
    boxes = {name: described(name)[1].after.boxes for name in ("mlp_half", "row_with_dropout")}
    base = {name: [box.ops for box in found if box.part == "base"] for name, found in boxes.items()}
    assert base["mlp_half"] == [
        ("rms_norm",),
        ("gather_sequence",),
        ("linear",),
        ("silu", "add", "mul"),
        ("linear",),
        ("reduce_scatter_sequence",),
        ("add",),
    ]
    assert base["row_with_dropout"] == [("linear",), ("reduce_from_group",), ("add",)]
    weights = [box.operands[0].name for found in boxes.values() for box in found if box.part == "base" and box.operands]
    assert weights == ["weight", "W0", "W0", "W0", "bias"]


def test_layers_have_their_sites_and_modules_their_names():
    for name in ("whole_layer", "whole_layer_recomputed"):
        description = described(name)[1]
        assert [path for path in dict.fromkeys(box.site for box in description.after.boxes) if path] == [
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        ]
        [gathered] = [box for box in description.after.boxes if box.ops == ("substitute_gathered_rows",)]
        assert gathered.site is None and "linear_proj B" in [operand.name for operand in gathered.operands]
        scales = [box for box in description.after.boxes if box.ops == ("scale_rows",)]
        # Scales of outputs that are cut are split, in the module that cuts them.
        assert [box.site.rpartition("_")[2] for box in scales] == [*["qkv"] * 3, "proj", "fc1", "fc1", "fc2"]


def test_kept_values_are_at_the_boxes_that_compute_them():
    _, description = described("row_sequence_parallel")
    kept = {box.ops: [tensor.shape for tensor in box.kept] for box in description.after.boxes if box.kept}
    assert kept == {("linear", "mul"): [(8, 1, 16)], ("reduce_scatter_sequence",): [(4, 1, 80)]}
    assert not any(box.kept for box in described("whole_layer_recomputed")[1].after.boxes)
    assert all(box.kept is None for box in description.before.boxes)
    with layer_graphs("column") as graphs, pytest.raises(ValueError, match=r"found \['nowhere'\], expected names"):
        describe_layer(graphs.before[0].graph, graphs.after[0].graph, TITLE, kept={"nowhere": ()})


def test_graphs_of_a_world_that_ended_are_an_error():
    graphs, _ = described("column")
    with pytest.raises(RuntimeError, match="found no tensor-parallel process group"):
        describe_layer(graphs.before[0].graph, graphs.after[0].graph, TITLE)


def test_a_description_is_json():
    description = described("whole_layer")[1]
    read = json.loads(json.dumps(dataclasses.asdict(description)))
    assert read["title"] == TITLE and len(read["after"]["boxes"]) == len(description.after.boxes)


@pytest.mark.parametrize("name", LAYERS)
def test_the_picture_shows_the_description(name):
    description = described(name)[1]
    root = ElementTree.fromstring(draw(description))
    assert root.find(f"{SVG}text").text == TITLE
    for side, graph in (("before", description.before), ("after", description.after)):
        group = root.find(f"{SVG}g[@id='{side}']")
        boxes = {box.get("data-name"): box for box in group.iter(f"{SVG}g") if box.get("class") == "box"}
        assert [*boxes] and boxes.keys() == {box.name for box in graph.boxes}
        rects = {name: edges_of(box.find(f"{SVG}rect")) for name, box in boxes.items()}
        for box in graph.boxes:
            check_box(box, boxes[box.name], rects[box.name])
        check_apart([*rects.values()])
        lines = [line for line in group.iter(f"{SVG}path") if line.get("data-source")]
        assert [(line.get("data-source"), line.get("data-target")) for line in lines] == [
            (edge.source, edge.target) for edge in graph.edges
        ]
        for line in lines:
            check_line(line, rects)
        width = float(root.get("width"))
        left = float(re.match(r"translate\(([\d.]+) ", group.get("transform"))[1])
        assert all(left + rect[0] >= 0 and left + rect[2] < width for rect in rects.values())


def test_a_long_path_is_inside_its_frame():
    description = described("column")[1]
    path = "mlp.experts.local_experts.127.linear_fc1"
    boxes = tuple(
        dataclasses.replace(box, site=path if box.site is not None else None) for box in description.after.boxes
    )
    root = ElementTree.fromstring(
        draw(dataclasses.replace(description, after=dataclasses.replace(description.after, boxes=boxes)))
    )
    after = root.find(f"{SVG}g[@id='after']")
    [frame] = [edges_of(rect) for rect in after.iter(f"{SVG}rect") if rect.get("class") == "group"]
    [header] = [text for text in after.iter(f"{SVG}text") if "of-group" in text.get("class")]
    assert header.text == path
    check_text(header, frame)


def edges_of(rect: ElementTree.Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def check_box(box, drawn: ElementTree.Element, rect: tuple[float, float, float, float]) -> None:
    """Text is inside, as wide as fixed-width fonts make it; messages have a frame each."""
    for text in drawn.iter(f"{SVG}text"):
        check_text(text, rect)
    frames = Counter(rect.get("class") for rect in drawn.findall(f"{SVG}rect")[1:])
    assert frames["forward"] == sum(message.when == "forward" for message in box.messages)
    assert frames["backward"] == sum(message.when == "backward" for message in box.messages)
    assert bool(frames["kept"]) == bool(box.kept)
    texts = " ".join(text.text for text in drawn.iter(f"{SVG}text"))
    assert all(operand.name in texts for operand in box.operands)
    assert all(f"[{', '.join(map(str, tensor.shape))}] {tensor.dtype}" in texts for tensor in box.outputs)
    assert drawn.find(f"{SVG}rect").get("class") == box.part


def check_text(text: ElementTree.Element, rect: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = rect
    size = 13 if "title" in text.get("class") else 11
    assert left < float(text.get("x")) and float(text.get("x")) + len(text.text) * 0.605 * size < right, text.text
    assert top < float(text.get("y")) - 0.7 * size and float(text.get("y")) < bottom


def check_apart(rects: list[tuple[float, float, float, float]]) -> None:
    for number, one in enumerate(rects):
        for other in rects[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def check_line(line: ElementTree.Element, rects: dict[str, tuple[float, float, float, float]]) -> None:
    """A line leaves its source below and enters its target above."""
    source, target = rects[line.get("data-source")], rects[line.get("data-target")]
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", line.get("d"))]
    start_x, start_y = numbers[:2]
    assert source[0] <= start_x <= source[2] and start_y == pytest.approx(source[3], abs=0.2)
    assert numbers[-1] == pytest.approx(target[1], abs=0.2)


def test_the_tree_shows_the_description():
    _, description = described("whole_layer")
    console = Console(width=200, file=io.StringIO())
    console.print(tree_of(description))
    text = console.file.getvalue()
    boxes = description.before.boxes + description.after.boxes
    assert all(f"{box.name} = " in text for box in boxes)
    assert text.count(" over 2, ") == sum(len(box.messages) for box in boxes) > 0
    # Shapes look like rich's own markup.
    assert "A gathered [4, 32] f32 512 B" in text
    with layer_graphs("column") as graphs:
        console.print(layer_tree(graphs.before[0].graph, graphs.after[0].graph))


def test_the_documents_show_the_layer_as_it_is():
    found = PICTURE.read_text(encoding="utf-8")
    assert found == picture(), "python -m tests.graph.layer_picture draws docs/images/mlp_half.svg anew"
