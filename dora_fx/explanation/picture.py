"""Draw a described layer as SVG, before the passes on the left and after them on the right.

All text in boxes is of one width per character, so that its length is known. Colours are classes of a style sheet with
a second set for dark pages; the picture has a background of its own, and so can be read on a page of either kind.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape, quoteattr

from torch import fx

from dora_fx.explanation.graph_boxes import Kept
from dora_fx.explanation.grouped_layout import Layout, Line, lay_out
from dora_fx.explanation.layer_description import describe_layer
from dora_fx.explanation.layer_parts import Box, GraphDescription, LayerDescription, Part
from dora_fx.explanation.layout_parts import Point, Rect
from dora_fx.explanation.wording import (
    kept_texts,
    message_text,
    operand_texts,
    ops_text,
    tensor_texts,
    title_of,
    totals_texts,
)

# Widths of a character by its size, of the widest fixed-width font that browsers choose.
_WIDTH_PER_SIZE = 0.61
_TITLE_SIZE, _TEXT_SIZE, _ROW, _PADDING, _MOST_CHARACTERS = 13.0, 11.0, 16.0, 9.0, 32
_MARGIN, _BETWEEN, _HEADER, _LEGEND = 22.0, 40.0, 124.0, 44.0
_GROUP = "group:"
_GROUP_INDENT = 11.0

_STYLE = """
svg { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace }
.page { fill: #ffffff; stroke: #d0d7de }
.group { fill: #f6f8fa; stroke: #c3ccd6; stroke-dasharray: 4 3 }
.base { fill: #e3eefc; stroke: #6f9bd1 }
.dora { fill: #ffecd1; stroke: #dc8a1b }
.input, .output { fill: #ffffff; stroke: #8c959f }
.forward { fill: #b4236a; stroke: #b4236a }
.backward { fill: none; stroke: #b4236a }
.kept { fill: none; stroke: #1a7f4b }
text { fill: #1f2328; font-size: 11px }
text.title { font-size: 13px; font-weight: 600 }
text.heading { font-size: 16px; font-weight: 600 }
text.faint { fill: #59636e }
text.of-group { stroke: #f6f8fa; stroke-width: 5px; paint-order: stroke }
text.on-forward { fill: #ffffff }
text.on-backward { fill: #b4236a }
text.on-kept { fill: #1a7f4b }
.line { fill: none; stroke-width: 1.4 }
.line.of-base { stroke: #7a8490 }
.line.of-dora { stroke: #dc8a1b }
.head.of-base { fill: #7a8490 }
.head.of-dora { fill: #dc8a1b }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #30363d }
.group { fill: #151b23; stroke: #3d444d }
.base { fill: #14294a; stroke: #4a7fc1 }
.dora { fill: #40290a; stroke: #d8912f }
.input, .output { fill: #0d1117; stroke: #7d8590 }
.forward { fill: #d84a8f; stroke: #d84a8f }
.backward { stroke: #f08cbb }
.kept { stroke: #4fc384 }
text { fill: #e6edf3 }
text.faint { fill: #aab2bc }
text.of-group { stroke: #151b23 }
text.on-forward { fill: #0d1117 }
text.on-backward { fill: #f08cbb }
text.on-kept { fill: #4fc384 }
.line.of-base { stroke: #8b949e }
.line.of-dora { stroke: #d8912f }
.head.of-base { fill: #8b949e }
.head.of-dora { fill: #d8912f }
}
"""


def draw_layer(before: fx.Graph, after: fx.Graph, title: str, *, kept: Kept | None = None) -> str:
    """Return a layer's graphs before and after the passes as the text of an SVG file; see `describe_layer`."""
    return draw(describe_layer(before, after, title, kept=kept))


def draw(layer: LayerDescription) -> str:
    """Return a described layer as the text of an SVG file."""
    sides = [_Side(layer.before, "before"), _Side(layer.after, "after")]
    layouts = _lined_up(sides)
    widths = [max(layout.width, side.header_width) for side, layout in zip(sides, layouts, strict=True)]
    width = max(2 * _MARGIN + sum(widths) + _BETWEEN, 2 * _MARGIN + _text_width(layer.title, 16.0), _legend_width())
    height = _HEADER + max(layout.height for layout in layouts) + _LEGEND + _MARGIN
    parts = [_text(_MARGIN, 36.0, layer.title, "heading")]
    for side, layout, x in zip(sides, layouts, (_MARGIN, width - _MARGIN - widths[1]), strict=True):
        parts.append(f"<g id={quoteattr(side.name)} transform={_moved(x, _HEADER)}>{''.join(side.drawn(layout))}</g>")
    parts.append(f"<g transform={_moved(_MARGIN, height - _LEGEND + 8)}>{''.join(_legend())}</g>")
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    page = f'<rect class="page" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="10"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={quoteattr(layer.title)}>\n'
        f"<style>{_STYLE}</style>\n{_arrow_heads()}\n{page}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _lined_up(sides: Sequence[_Side]) -> list[Layout]:
    """Lay both sides out, with what both have at the same height."""
    lowest: dict[str, float] = {}
    layouts = [side.laid_out(lowest) for side in sides]
    # Each turn moves at least one of them for good.
    for _ in layouts[0].tops.keys() & layouts[1].tops.keys():
        tops = {
            name: max(layout.tops[name] for layout in layouts) for name in layouts[0].tops if name in layouts[1].tops
        }
        if tops == lowest:
            break
        lowest = tops
        layouts = [side.laid_out(lowest) for side in sides]
    return layouts


@dataclass(frozen=True)
class _Row:
    """A line of text in a box; `pill` is the class of the frame around it, "" without one."""

    text: str
    style: str = ""
    pill: str = ""

    @property
    def width(self) -> float:
        size = _TITLE_SIZE if self.style == "title" else _TEXT_SIZE
        return _text_width(self.text, size) + (12.0 if self.pill else 0.0)


class _Side:
    """One graph's boxes with their text, and how they are drawn."""

    def __init__(self, graph: GraphDescription, name: str) -> None:
        self.graph, self.name = graph, name
        self.boxes = {box.name: box for box in graph.boxes}
        self.rows = {box.name: _rows(box) for box in graph.boxes}

    @property
    def header_width(self) -> float:
        return max(_text_width(text, _TEXT_SIZE) for text in totals_texts(self.graph))

    def laid_out(self, lowest: Mapping[str, float]) -> Layout:
        sizes = {name: _size(rows) for name, rows in self.rows.items()}
        lines: list[Line] = [(edge.source, edge.target) for edge in self.graph.edges]
        groups = {box.name: _GROUP + box.site for box in self.graph.boxes if box.site is not None}
        narrowest = {
            group: _text_width(group.removeprefix(_GROUP), _TITLE_SIZE) + 2 * _GROUP_INDENT for group in groups.values()
        }
        return lay_out(sizes, lines, groups, lowest, narrowest)

    def drawn(self, layout: Layout) -> Iterable[str]:
        yield _text(0.0, 64.0 - _HEADER, f"{self.name} the passes", "title")
        for number, text in enumerate(totals_texts(self.graph)):
            yield _text(0.0, number * _ROW - _HEADER + 82.0, text, "faint")
        for rect in layout.groups.values():
            yield _rect(rect, "group", 8)
        for (source, target), points in layout.lines.items():
            part: Part = "dora" if self.boxes[source].part == "dora" else "base"
            yield _line(source, target, points, part)
        for name, rect in layout.groups.items():
            yield _text(rect.x + _GROUP_INDENT, rect.y + 17, name.removeprefix(_GROUP), "title faint of-group")
        for name, rect in layout.boxes.items():
            yield _drawn_box(self.boxes[name], self.rows[name], rect)


def _rows(box: Box) -> list[_Row]:
    rows = [_Row(line, "title") for line in _wrapped(title_of(box, "layer"))]
    rows += [_Row(line, "faint") for line in _wrapped(_caption(box))]
    rows += [_Row(line) for text in tensor_texts(box.outputs) for line in _wrapped(text)]
    for names, tensor in operand_texts(box.operands):
        together = f"{names} {tensor}"
        lines = [together] if len(together) <= _MOST_CHARACTERS else [*_wrapped(names), *_wrapped(tensor)]
        rows += [_Row(line, "faint") for line in lines]
    rows += [_Row(message_text(message), f"on-{message.when}", message.when) for message in box.messages]
    rows += [_Row(text, "on-kept", "kept") for text in kept_texts(box)]
    return rows


def _caption(box: Box) -> str:
    return ops_text(box) or (box.path if box.site is None and box.part == "base" else "")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _MOST_CHARACTERS, break_on_hyphens=False)


def _size(rows: Sequence[_Row]) -> tuple[float, float]:
    return max(row.width for row in rows) + 2 * _PADDING, len(rows) * _ROW + 2 * _PADDING - 4


def _drawn_box(box: Box, rows: Sequence[_Row], rect: Rect) -> str:
    parts = [_rect(rect, box.part, 14 if box.part in ("input", "output") else 5)]
    for number, row in enumerate(rows):
        y = rect.y + _PADDING + number * _ROW
        x = rect.x + _PADDING
        if row.pill:
            parts.append(_rect(Rect(x, y - 1.0, row.width, _ROW - 1.5), row.pill, 7))
            x += 6.0
        parts.append(_text(x, y + 9.5, row.text, row.style))
    nodes = f"<title>{escape(', '.join(box.nodes))}</title>"
    return f'<g class="box" data-name={quoteattr(box.name)}>{nodes}{"".join(parts)}</g>'


def _line(source: str, target: str, points: Sequence[Point], part: Part) -> str:
    """A line through points, which leaves and reaches each of them straight down."""
    steps = [f"M{points[0].x:.1f},{points[0].y:.1f}"]
    for start, end in pairwise(points):
        if abs(start.x - end.x) < 0.05:
            steps.append(f"V{end.y:.1f}")
        else:
            middle = (start.y + end.y) / 2
            steps.append(f"C{start.x:.1f},{middle:.1f} {end.x:.1f},{middle:.1f} {end.x:.1f},{end.y:.1f}")
    ends = f"data-source={quoteattr(source)} data-target={quoteattr(target)}"
    return f'<path class="line of-{part}" {ends} marker-end="url(#head-{part})" d="{"".join(steps)}"/>'


def _arrow_heads() -> str:
    heads = (
        f'<marker id="head-{part}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path class="head of-{part}" d="M0,0.5 L8,4 L0,7.5 Z"/></marker>'
        for part in ("base", "dora")
    )
    return f"<defs>{''.join(heads)}</defs>"


_LEGEND_ENTRIES = (
    ("base", "frozen base"),
    ("dora", "DoRA"),
    ("forward", "sent in the forward pass"),
    ("backward", "sent in the backward pass"),
    ("kept", "kept for the backward pass"),
)


def _legend() -> Iterable[str]:
    x = 0.0
    for style, text in _LEGEND_ENTRIES:
        yield _rect(Rect(x, 0.0, 18.0, 12.0), style, 4) + _text(x + 24, 10.0, text, "faint")
        x += 44 + _text_width(text, _TEXT_SIZE)


def _legend_width() -> float:
    return 2 * _MARGIN + sum(44 + _text_width(text, _TEXT_SIZE) for _, text in _LEGEND_ENTRIES)


def _rect(rect: Rect, style: str, radius: int) -> str:
    place = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
    return f'<rect class="{style}" {place} rx="{radius}"/>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _text_width(text: str, size: float) -> float:
    return len(text) * size * _WIDTH_PER_SIZE


def _moved(x: float, y: float) -> str:
    return f'"translate({x:.1f} {y:.1f})"'
