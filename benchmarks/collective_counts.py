"""Count the collectives that a module really calls in forward and backward, whoever compiled it, and their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_fx.ranks.groups import group_size

# (kind, bytes of the larger side) -> how many
Count = Counter[tuple[str, int]]

_KINDS = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass
class CollectiveCounts:
    """Collectives of one module.

    Attributes:
        once_per_step: what the first forward pass after an optimizer step has beyond the others, and what follows the
            last backward pass.
        forward, backward: of each micro-batch.
    """

    once_per_step: Count = field(default_factory=Counter)
    forward: Count = field(default_factory=Counter)
    backward: Count = field(default_factory=Counter)

    def __sub__(self, other: CollectiveCounts) -> CollectiveCounts:
        """What this module has beyond another."""
        return CollectiveCounts(
            self.once_per_step - other.once_per_step, self.forward - other.forward, self.backward - other.backward
        )


class _CollectiveCounter(TorchDispatchMode):
    """Sees torch.distributed's own collectives and the functional ones that compiled graphs hold."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Compiled functions run compiled under this mode.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._opname.strip("_")
        is_collective = func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier")
        if is_collective and _num_ranks(args) > 1:
            self.count[_kind(name), max(map(_num_bytes, (*args, result)))] += 1
        return result


def _kind(name: str) -> str:
    """all_gather for _allgather_base_ and all_gather_into_tensor, and so on; the name itself for any other op."""
    spelled = name.replace("allreduce", "all_reduce").replace("allgather", "all_gather")
    return next((kind for kind in _KINDS if spelled.startswith(kind)), name)


def _num_ranks(args: Any) -> int:
    """Of the group among an op's arguments, which is an object or, last, a name."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument).size()
    return group_size(args[-1])


def _num_bytes(side: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor))


def count_collectives(
    module: nn.Module, x: torch.Tensor, finish: Callable[[], object] = lambda: None
) -> CollectiveCounts:
    """Count what the first two micro-batches after an optimizer step call; a group of one rank sends nothing.

    Args:
        module: eager or compiled; what is trained must be a parameter of it.
        x: its input.
        finish: called after the last backward pass of a step, as `finalize_model_grads` is.
    """

    def loss() -> torch.Tensor:
        output = module(x)
        return (output[0] if isinstance(output, tuple) else output).sum()

    # Compilation is over before anything is counted.
    loss().backward()
    finish()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if trained:
        torch.optim.SGD(trained, lr=0.0).step()
    counts, first, last = CollectiveCounts(), Counter(), Counter()
    with _CollectiveCounter(first):
        loss()
    with _CollectiveCounter(counts.forward):
        total = loss()
    with _CollectiveCounter(counts.backward):
        total.backward()
    with _CollectiveCounter(last):
        finish()
    counts.once_per_step = first - counts.forward + last
    return counts
