"""A layout of boxes, of groups of them, and of the lines between them.

A group is laid out by itself, and is one box of the layout around it. Where lines cross its border, it has ports: items
of no height in its first or last layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dora_fx.explanation.layers_of_boxes import place
from dora_fx.explanation.layout_parts import Item, Net, Placed, Point, Rect

GROUP_PADDING, GROUP_HEADER = 12.0, 24.0
# Names of ports, with the value that goes through.
_ENTRY, _EXIT = "entry:", "exit:"

Line = tuple[str, str]
# Name of a group, and of a port.
Port = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    """Places of boxes and groups by their names, and the points of lines by what they join.

    Attributes:
        tops: the upper ends of groups, and of boxes without one.
        crossings: how often lines cross.
        port_places: how far to the right the lines are that go through each port of a group.
    """

    boxes: Mapping[str, Rect]
    groups: Mapping[str, Rect]
    lines: Mapping[Line, tuple[Point, ...]]
    tops: Mapping[str, float]
    width: float
    height: float
    crossings: int
    port_places: Mapping[Port, float]


def lay_out(
    sizes: Mapping[str, tuple[float, float]],
    lines: Iterable[Line],
    groups: Mapping[str, str],
    lowest: Mapping[str, float] | None = None,
    narrowest: Mapping[str, float] | None = None,
) -> Layout:
    """Place boxes, groups and lines.

    Args:
        sizes: width and height of each box.
        lines: from and to a box; they make no circles.
        groups: the group of each box that has one. No line leaves a group and comes back to it.
        lowest: the least y of groups, and of boxes without one.
        narrowest: the least width of groups, as their headers need it.
    """
    lines, lowest, narrowest = list(dict.fromkeys(lines)), lowest or {}, narrowest or {}
    found = _laid_out(sizes, lines, groups, lowest, narrowest, {})
    # Lines reach a group in some order; inside, its ports had another one, in which they may cross less often or more.
    ordered = _laid_out(sizes, lines, groups, lowest, narrowest, found.port_places)
    return min((ordered, found), key=lambda layout: layout.crossings)


def _laid_out(
    sizes: Mapping[str, tuple[float, float]],
    lines: Sequence[Line],
    groups: Mapping[str, str],
    lowest: Mapping[str, float],
    narrowest: Mapping[str, float],
    port_places: Mapping[Port, float],
) -> Layout:
    outer_of = {name: groups.get(name, name) for name in sizes}
    insides = {
        group: _inside(group, sizes, lines, outer_of, narrowest.get(group, 0.0), port_places)
        for group in dict.fromkeys(groups.values())
    }
    items = {
        outer: insides[outer].as_item() if outer in insides else Item(*sizes[outer])
        for outer in dict.fromkeys(outer_of.values())
    }
    placed = place(items, _nets((source, outer_of[source], outer_of[target]) for source, target in lines), lowest)
    boxes = {
        name: insides[outer].rects[name].moved(placed.rects[outer].x, placed.rects[outer].y)
        if outer in insides
        else placed.rects[outer]
        for name, outer in outer_of.items()
    }
    found: dict[Port, float] = {}
    for (value, source, target), way in placed.ways.items():
        found |= {(source, _EXIT + value): way[min(2, len(way) - 1)].x, (target, _ENTRY + value): way[-2].x}
    return Layout(
        boxes=boxes,
        groups={group: placed.rects[group] for group in insides},
        lines={line: _way(line, outer_of, placed, insides) for line in lines},
        tops={name: rect.y for name, rect in placed.rects.items()},
        width=placed.width,
        height=placed.height,
        crossings=placed.crossings + sum(inside.crossings for inside in insides.values()),
        port_places=found,
    )


def _nets(parts: Iterable[tuple[str, str, str]]) -> dict[Net, list[str]]:
    """Gather parts of lines (value, from, to) by the value and where it comes from."""
    nets: dict[Net, list[str]] = defaultdict(list)
    for value, source, target in dict.fromkeys(parts):
        if source != target:
            nets[value, source].append(target)
    return nets


class _Inside(Placed):
    """A group's own layout, in its border."""

    def as_item(self) -> Item:
        return Item(self.width, self.height, self._ports(_ENTRY), self._ports(_EXIT))

    def _ports(self, prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): rect.x for name, rect in self.rects.items() if name.startswith(prefix)}


def _inside(
    group: str,
    sizes: Mapping[str, tuple[float, float]],
    lines: Sequence[Line],
    outer_of: Mapping[str, str],
    narrowest: float,
    port_places: Mapping[Port, float],
) -> _Inside:
    items = {name: Item(*sizes[name]) for name, outer in outer_of.items() if outer == group}
    parts = [part for line in lines for part in _parts_inside(line, group, outer_of)]
    for _, source, target in parts:
        if source not in items:
            items[source] = Item(0.0, 0.0, at_end="first", place=port_places.get((group, source)))
        if target not in items:
            items[target] = Item(0.0, 0.0, at_end="last", place=port_places.get((group, target)))
    placed = place(items, _nets(parts))
    height = placed.height + GROUP_HEADER

    def moved(name: str, rect: Rect) -> Rect:
        rect = rect.moved(GROUP_PADDING, GROUP_HEADER)
        # Ports are on the border itself.
        if name.startswith(_ENTRY):
            return replace(rect, y=0.0)
        return replace(rect, y=height) if name.startswith(_EXIT) else rect

    rects = {name: moved(name, rect) for name, rect in placed.rects.items()}
    ways = {
        way: tuple(Point(point.x + GROUP_PADDING, point.y + GROUP_HEADER) for point in points)
        for way, points in placed.ways.items()
    }
    return _Inside(rects, ways, max(placed.width + 2 * GROUP_PADDING, narrowest), height, placed.crossings)


def _parts_inside(line: Line, group: str, outer_of: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return the part of a line that is inside a group: its value, where it comes from there, and where it goes to."""
    source, target = line
    starts, ends = outer_of[source] == group, outer_of[target] == group
    if not starts and not ends:
        return []
    return [(source, source if starts else _ENTRY + source, target if ends else _EXIT + source)]


def _way(line: Line, outer_of: Mapping[str, str], placed: Placed, insides: Mapping[str, _Inside]) -> tuple[Point, ...]:
    """Join the parts of a line inside its source's group, between groups, and inside its target's group."""
    source, target = line
    start, end = outer_of[source], outer_of[target]
    points: list[Point] = []
    for group in dict.fromkeys((start, end)):
        if group == end and start != end:
            points += placed.ways[source, start, end]
        for part in _parts_inside(line, group, outer_of) if group in insides else ():
            corner = placed.rects[group]
            points += [Point(point.x + corner.x, point.y + corner.y) for point in insides[group].ways[part]]
    return tuple(points)
