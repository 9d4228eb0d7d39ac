"""The number of an expert in a path: what follows `local_experts`, in the layer's own count or the whole model's."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\blocal_experts\.)\d+(?=\.|$)")


def expert_number_maybe(path: str) -> int | None:
    """Return the number of the expert that a module or a parameter is of; None for one of no expert."""
    match = _NUMBER.search(path)
    return int(match[0]) if match else None


def with_expert_number(path: str, number: str) -> str:
    """Return a path with another number, or what stands for all, in place of its expert's; others as they are."""
    return _NUMBER.sub(number, path)
