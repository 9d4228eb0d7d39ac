"""Count the collectives of a compiled layer, and their bytes, from the ATen graphs of forward and backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from dora_fx.passes import default_passes
from dora_fx.passes.pipeline import run_passes

COLLECTIVES = {
    torch.ops._c10d_functional.all_reduce.default: "all_reduce",
    torch.ops._c10d_functional.all_reduce_.default: "all_reduce",
    torch.ops._c10d_functional.all_gather_into_tensor.default: "all_gather",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: "reduce_scatter",
}

Count = Counter[tuple[str, int]]


@dataclass
class CollectiveCounts:
    """Collectives of one layer: (kind, elements of the larger side) -> how many, by direction."""

    forward: Count = field(default_factory=Counter)
    backward: Count = field(default_factory=Counter)

    def __sub__(self, other: CollectiveCounts) -> CollectiveCounts:
        """What this layer has beyond another's."""
        return CollectiveCounts(self.forward - other.forward, self.backward - other.backward)


def _count(gm: fx.GraphModule, into: Count) -> None:
    for node in gm.graph.nodes:
        if node.target in COLLECTIVES:
            sizes = [value.meta["val"].numel() for value in (node, node.all_input_nodes[0])]
            into[COLLECTIVES[node.target], max(sizes)] += 1


def count_collectives(model: nn.Module, x: torch.Tensor) -> CollectiveCounts:
    """Compile forward and backward of a layer on `x` with the dora_fx passes and count what communicates."""
    counts = CollectiveCounts()

    def compiler(direction: Count) -> Any:
        def count_and_return(gm: fx.GraphModule, example_inputs: Any) -> Any:
            _count(gm, direction)
            return make_boxed_func(gm)

        return count_and_return

    aot = aot_autograd(
        fw_compiler=compiler(counts.forward),
        bw_compiler=compiler(counts.backward),
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return aot(run_passes(gm, example_inputs, default_passes()), example_inputs)

    torch._dynamo.reset()
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    output = output[0] if isinstance(output, tuple) else output
    output.sum().backward()
    return counts


class CollectivesThatRun(TorchDispatchMode):
    """Within the context, counts the collectives that run; elements of the larger side as above."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Count = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in COLLECTIVES:
            self.counts[COLLECTIVES[function], max(result.numel(), args[0].numel())] += 1
        return result
