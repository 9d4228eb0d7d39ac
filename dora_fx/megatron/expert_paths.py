"""The number of an expert in a path: what follows `local_experts`, in the layer's own count or the whole model's."""

from __future__ import annotations

import re

# A range stands for the experts that one module holds.
_NUMBER = re.compile(r"(?<=\blocal_experts\.)\d+(-\d+)?(?=\.|$)")


def expert_number_maybe(path: str) -> int | None:
    """Return the number of the expert that a module or a parameter is of; None for one of no expert, or of several."""
    match = _NUMBER.search(path)
    return int(match[0]) if match and not match[1] else None


def expert_path_maybe(path: str) -> str | None:
    """Return the path of the expert, or of the experts of a range, that a module or a parameter is in; else None."""
    match = _NUMBER.search(path)
    return path[: match.end()] if match else None


def path_of_expert(grouped_path: str, number: str) -> str:
    """Return the path that an expert's layer has in a SequentialMLP, from that of a layer that holds several.

    For the number there may be a range of them, such as "0-15".
    """
    parent, _, name = grouped_path.rpartition(".")
    return f"{parent}.local_experts.{number}.{name}"


def with_expert_number(path: str, number: str) -> str:
    """Return a path with another number, or what stands for all, in place of its expert's; others as they are."""
    return _NUMBER.sub(number, path)
