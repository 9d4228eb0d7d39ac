"""What a layout places, and where: boxes, lines between them, and points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# A value and the box that it comes from; and also the box that it goes to.
Net = tuple[str, str]
Way = tuple[str, str, str]


@dataclass(frozen=True)
class Rect:
    """A box's place; x and y are those of its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    def moved(self, dx: float, dy: float) -> Rect:
        """Return it in another place."""
        return replace(self, x=self.x + dx, y=self.y + dy)


@dataclass(frozen=True)
class Point:
    """A point that a line passes through."""

    x: float
    y: float


@dataclass(frozen=True)
class Item:
    """What takes room in a layer.

    Attributes:
        entries, exits: where lines meet its upper and lower side, from its left side, by their values; lines without a
            place there are spread around the middle.
        at_end: whether it is in the first layer, "first", or below all others, "last".
        place: where it is in the order of such a layer, None to let it be found.
    """

    width: float
    height: float
    entries: Mapping[str, float] = field(default_factory=dict)
    exits: Mapping[str, float] = field(default_factory=dict)
    at_end: str = ""
    place: float | None = None

    def entry(self, value: str) -> float:
        """Return where a value enters, from the left side."""
        return self.entries.get(value, self.width / 2)

    def exit(self, value: str) -> float:
        """Return where a value leaves, from the left side."""
        return self.exits.get(value, self.width / 2)


@dataclass(frozen=True)
class Placed:
    """Places of items, the points of lines from item to item, and how often these cross."""

    rects: Mapping[str, Rect]
    ways: Mapping[Way, tuple[Point, ...]]
    width: float
    height: float
    crossings: int
