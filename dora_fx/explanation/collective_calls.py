"""Reads torch's functional collectives, where they are nodes of a graph and where eager code calls them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_fx.ranks import group_size

_KINDS = ("all_reduce", "all_gather", "reduce_scatter")


class CollectiveCall(NamedTuple):
    """One call of a collective among several ranks.

    Attributes:
        kind: "all_reduce", "all_gather" or "reduce_scatter", or the name of another op.
        group: name of the process group.
        num_ranks: of the group.
        inputs, outputs: the tensors that it takes and returns, which may be fake.
    """

    kind: str
    group: str
    num_ranks: int
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int | None:
        """Bytes of what goes in or of what comes out, whichever is more; None if a size is symbolic."""
        sides = [sum(each.numel() * each.element_size() for each in side) for side in (self.inputs, self.outputs)]
        return max(sides) if all(isinstance(side, int) for side in sides) else None


def is_collective(target: Any) -> bool:
    """Return whether the target of a node or a call is a functional collective that sends."""
    name = getattr(getattr(target, "_schema", None), "name", str(target))
    return "_c10d_functional" in name and "wait_tensor" not in name


def collective_maybe(target: Any, args: Any, result: Any) -> CollectiveCall | None:
    """Return the call that a target, its arguments and what it returns are; None where nothing is sent.

    A group of one rank sends nothing.

    Args:
        args: with the values of nodes in their places; the last one is the name of the group.

    Raises:
        RuntimeError: the process group is not there any more.
    """
    if not is_collective(target) or (num_ranks := group_size(args[-1])) == 1:
        return None
    name = str(getattr(target, "__name__", target))
    kind = next((kind for kind in _KINDS if name.startswith(kind)), name.partition(".")[0])
    inputs, outputs = (
        tuple(leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)) for values in (args, result)
    )
    return CollectiveCall(kind, args[-1], num_ranks, inputs, outputs)


class CollectiveRecorder(TorchDispatchMode):
    """Keeps the collectives that eager code calls, in order, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[CollectiveCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (call := collective_maybe(func, args, result)) is not None:
            self.calls.append(call)
        return result
