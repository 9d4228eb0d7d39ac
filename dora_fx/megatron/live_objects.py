"""Find objects by class among all objects of this process, where there is no reference to follow."""

from __future__ import annotations

import gc
from typing import Any


def live_objects(classes: type | tuple[type, ...]) -> list[Any]:
    """Return all objects of these classes and their subclasses, also those that only cycles keep alive."""
    objects = gc.get_objects()
    # A process has millions of objects, of some thousand classes.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, classes)}
    return [found for found in objects if type(found) in kinds]
