"""Places boxes in layers from top to bottom, so that lines between them are short and seldom cross.

Each box is below all whose values it takes: its layer is its longest path from a source. A line past other layers has
a lane through each of them, which all lines with the same value share. In a layer, boxes and lanes are ordered by the
mean positions of their neighbours, as long as fewer lines cross; sideways they are as near to their neighbours as the
order and the gaps permit, which is a regression with ordered results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dora_fx.explanation.layout_parts import Item, Net, Placed, Point, Rect

GAP_ACROSS, LANE_GAP = 18.0, 10.0
# Lines that go far to the side need room to turn.
_LEAST_GAP_DOWN, _MOST_GAP_DOWN, _SIDEWAYS_PER_DOWN = 18.0, 36.0, 8.0
_ENTRY_SPACING, _SWEEPS, _STRAIGHT = 28.0, 16, 6.0


@dataclass(frozen=True)
class _Segment:
    """Part of a line from a layer to the next one."""

    value: str
    upper: str
    lower: str


def place(
    items: Mapping[str, Item], nets: Mapping[Net, Sequence[str]], lowest: Mapping[str, float] | None = None
) -> Placed:
    """Place items and the lines between them.

    Args:
        nets: the items that each value goes to, by the value and the item that it comes from.
        lowest: the least y of some items.
    """
    return _Placing(items, nets, lowest or {}).placed()


class _Placing:
    def __init__(
        self, items: Mapping[str, Item], nets: Mapping[Net, Sequence[str]], lowest: Mapping[str, float]
    ) -> None:
        self.items, self.nets, self.lowest = dict(items), nets, lowest
        self.layer_of = _layers(items, nets)
        self.lanes: dict[tuple[Net, int], str] = {}
        self.lane_names: set[str] = set()
        self.segments: list[_Segment] = []
        for net, targets in nets.items():
            self._add_segments(net, targets)
        self.above: dict[str, list[_Segment]] = defaultdict(list)
        self.below: dict[str, list[_Segment]] = defaultdict(list)
        for segment in self.segments:
            self.above[segment.lower].append(segment)
            self.below[segment.upper].append(segment)

    def _add_segments(self, net: Net, targets: Sequence[str]) -> None:
        value, upper = net
        last = max(self.layer_of[target] for target in targets)
        for layer in range(self.layer_of[net[1]] + 1, last + 1):
            self.segments += [_Segment(value, upper, target) for target in targets if self.layer_of[target] == layer]
            if layer < last:
                lane = f"lane:{value}:{net[1]}:{layer}"
                self.items[lane] = Item(0.0, 0.0)
                self.layer_of[lane] = layer
                self.lanes[net, layer] = lane
                self.lane_names.add(lane)
                self.segments.append(_Segment(value, upper, lane))
                upper = lane

    def placed(self) -> Placed:
        rows = self._ordered()
        left = self._across(rows)
        self._straighten(rows, left)
        least = min(left.values(), default=0.0)
        left = {name: x - least for name, x in left.items()}
        tops, bottoms = self._down(rows, left)
        rects = {
            name: Rect(left[name], tops[self.layer_of[name]], item.width, item.height)
            for name, item in self.items.items()
        }
        ways = {
            (value, source, target): self._way((value, source), target, rects, tops, bottoms)
            for (value, source), targets in self.nets.items()
            for target in targets
        }
        width = max((rect.x + rect.width for rect in rects.values()), default=0.0)
        real = {name: rect for name, rect in rects.items() if name not in self.lane_names}
        return Placed(real, ways, width, bottoms[-1] if bottoms else 0.0, self._crossings(rows))

    def _ordered(self) -> list[list[str]]:
        """Return the items of each layer from left to right."""
        rows: list[list[str]] = [[] for _ in range(max(self.layer_of.values(), default=-1) + 1)]
        for name, layer in self.layer_of.items():
            rows[layer].append(name)
        for row in rows:
            row.sort(key=lambda name: self.items[name].place or 0.0)
        best, fewest = [list(row) for row in rows], self._crossings(rows)
        for sweep in range(_SWEEPS):
            downwards = sweep % 2 == 0
            for row in rows if downwards else rows[::-1]:
                if any(self.items[name].place is not None for name in row):
                    continue
                position = {name: index / max(len(r) - 1, 1) for r in rows for index, name in enumerate(r)}
                row.sort(key=lambda name: self._mean_position(name, position, downwards))
            crossings = self._crossings(rows)
            if crossings < fewest:
                best, fewest = [list(row) for row in rows], crossings
        return best

    def _mean_position(self, name: str, position: Mapping[str, float], downwards: bool) -> float:
        neighbours = [one.upper for one in self.above[name]] if downwards else [one.lower for one in self.below[name]]
        return sum(position[one] for one in neighbours) / len(neighbours) if neighbours else position[name]

    def _crossings(self, rows: Sequence[Sequence[str]]) -> int:
        index = {name: place for row in rows for place, name in enumerate(row)}
        by_layer = defaultdict(list)
        for one in self.segments:
            by_layer[self.layer_of[one.upper]].append((index[one.upper], index[one.lower]))
        return sum((a - c) * (b - d) < 0 for pairs in by_layer.values() for (a, b), (c, d) in combinations(pairs, 2))

    def _across(self, rows: Sequence[Sequence[str]]) -> dict[str, float]:
        """Return the left side of each item."""
        left: dict[str, float] = {}
        for row in rows:
            left.update(zip(row, self._side_by_side(row), strict=True))
        for sweep in range(2 * _SWEEPS):
            last = sweep >= 2 * _SWEEPS - 4
            for row in rows if sweep % 2 == 0 else rows[::-1]:
                wishes = [self._wish(name, left, sweep % 2 == 0 or last, sweep % 2 == 1 or last) for name in row]
                left.update(zip(row, _nearest_in_order(wishes, self._side_by_side(row)), strict=True))
        return left

    def _straighten(self, rows: Sequence[Sequence[str]], left: dict[str, float]) -> None:
        """Make the lanes of a line one straight line, where the items beside them leave the room."""
        chains: dict[Net, list[str]] = defaultdict(list)
        for (net, _), lane in self.lanes.items():
            chains[net].append(lane)
        for _ in range(3):
            for chain in sorted(chains.values(), key=lambda lanes: -left[lanes[0]]):
                places = [left[lane] for lane in chain]
                for x in (max(places), min(places)):
                    if all(self._has_room(rows[self.layer_of[lane]], lane, x, left) for lane in chain):
                        left.update(dict.fromkeys(chain, x))
                        break

    def _has_room(self, row: Sequence[str], lane: str, x: float, left: Mapping[str, float]) -> bool:
        place, offsets = row.index(lane), self._side_by_side(row)
        from_left = x - left[row[place - 1]] >= offsets[place] - offsets[place - 1] if place else True
        to_right = left[row[place + 1]] - x >= offsets[place + 1] - offsets[place] if place + 1 < len(row) else True
        return from_left and to_right

    def _side_by_side(self, row: Sequence[str]) -> list[float]:
        places, x = [], 0.0
        for name, following in zip(row, [*row[1:], ""], strict=True):
            places.append(x)
            lanes = (name in self.lane_names) + (following in self.lane_names)
            x += self.items[name].width + (GAP_ACROSS, GAP_ACROSS * 0.75, LANE_GAP)[lanes]
        return places

    def _wish(self, name: str, left: Mapping[str, float], by_upper: bool, by_lower: bool) -> tuple[float, float]:
        """Return where an item's left side should be to make its lines straight, and how much that matters."""
        item, wishes = self.items[name], []
        for one in self.above[name] if by_upper else ():
            x = left[one.upper] + self.items[one.upper].exit(one.value)
            wishes.append((x - item.entry(one.value), self._weight(one)))
        for one in self.below[name] if by_lower else ():
            x = left[one.lower] + self.items[one.lower].entry(one.value)
            wishes.append((x - item.exit(one.value), self._weight(one)))
        total = sum(weight for _, weight in wishes)
        return (sum(x * weight for x, weight in wishes) / total, total) if wishes else (left[name], 0.1)

    def _weight(self, segment: _Segment) -> float:
        return _STRAIGHT if {segment.upper, segment.lower} <= self.lane_names else 1.0

    def _down(self, rows: Sequence[Sequence[str]], left: Mapping[str, float]) -> tuple[list[float], list[float]]:
        """Return the upper and the lower ends of the layers."""
        gaps = [_LEAST_GAP_DOWN] * len(rows)
        for one in self.segments:
            upper, lower = self.items[one.upper], self.items[one.lower]
            sideways = left[one.upper] + upper.exit(one.value) - left[one.lower] - lower.entry(one.value)
            layer = self.layer_of[one.lower]
            gaps[layer] = max(gaps[layer], min(_LEAST_GAP_DOWN + abs(sideways) / _SIDEWAYS_PER_DOWN, _MOST_GAP_DOWN))
        tops: list[float] = []
        bottoms: list[float] = []
        for row, gap in zip(rows, gaps, strict=True):
            top = bottoms[-1] + gap if bottoms else 0.0
            tops.append(max([top, *(self.lowest[name] for name in row if name in self.lowest)]))
            bottoms.append(tops[-1] + max(self.items[name].height for name in row))
        return tops, bottoms

    def _way(
        self, net: Net, target: str, rects: Mapping[str, Rect], tops: Sequence[float], bottoms: Sequence[float]
    ) -> tuple[Point, ...]:
        value, source = net
        x = rects[source].x + self.items[source].exit(value)
        points = [Point(x, rects[source].y + rects[source].height), Point(x, bottoms[self.layer_of[source]])]
        upper = source
        for layer in range(self.layer_of[source] + 1, self.layer_of[target]):
            upper = self.lanes[net, layer]
            points += [Point(rects[upper].x, tops[layer]), Point(rects[upper].x, bottoms[layer])]
        points.append(Point(rects[target].x + self._entry(value, upper, target, rects), rects[target].y))
        return tuple(points)

    def _entry(self, value: str, upper: str, target: str, rects: Mapping[str, Rect]) -> float:
        """Where a line enters a box: side by side with the others, in the order in which they come."""
        item = self.items[target]
        if value in item.entries:
            return item.entries[value]
        lines = sorted(self.above[target], key=lambda one: rects[one.upper].x + self.items[one.upper].exit(one.value))
        place = next(i for i, one in enumerate(lines) if one.value == value and one.upper == upper)
        spacing = min(_ENTRY_SPACING, item.width / (len(lines) + 1))
        return item.width / 2 + (place - (len(lines) - 1) / 2) * spacing


def _layers(items: Mapping[str, Item], nets: Mapping[Net, Sequence[str]]) -> dict[str, int]:
    """Return the layer of each item: below all that it takes values from, and sources just above their first reader."""
    above = defaultdict(set)
    below = defaultdict(set)
    for (_, source), targets in nets.items():
        for target in targets:
            above[target].add(source)
            below[source].add(target)
    layers = {name: 0 for name, item in items.items() if item.at_end == "first"}
    first = 1 if layers else 0
    waiting = [name for name in items if name not in layers]
    while waiting:
        name = next(one for one in waiting if above[one] <= layers.keys())
        waiting.remove(name)
        layers[name] = max([first, *(layers[one] + 1 for one in above[name])])
    last = max((layers[name] for name, item in items.items() if item.at_end != "last"), default=0)
    for name, item in items.items():
        if item.at_end == "last":
            layers[name] = last + 1
        elif not item.at_end and not above[name] and below[name]:
            layers[name] = max(first, min(layers[one] for one in below[name]) - 1)
    return {name: layers[name] for name in items}


def _nearest_in_order(wishes: Sequence[tuple[float, float]], side_by_side: Sequence[float]) -> list[float]:
    """Return places with the order and the distances of `side_by_side`, and the least weighted squares from the wishes.

    Without the distances this is isotonic regression: neighbours that would change places take their common mean.
    """
    blocks: list[tuple[float, float, int]] = []
    for (wish, weight), offset in zip(wishes, side_by_side, strict=True):
        mean, total, count = wish - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, other_total, other_count = blocks.pop()
            mean = (mean * total + other * other_total) / (total + other_total)
            total, count = total + other_total, count + other_count
        blocks.append((mean, total, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, side_by_side, strict=True)]
