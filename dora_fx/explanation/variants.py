"""The three variants of a layer that are compared, as lists of passes over the same captured layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from dora_fx.function import scale_rows
from dora_fx.passes import GraphPass, default_passes, subgraph_modules


def passes_of(variant: str) -> list[GraphPass]:
    """Return the passes that make a variant's graph; adapters are off for "base", so that they find nothing there."""
    passes = default_passes()
    # The rewrite comes first; what is behind it prepares the scales for fusion.
    return [passes[0], without_magnitude_pass] if variant == "lora" else passes


def without_magnitude_pass(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Turn rewritten DoRA sites into LoRA with the same factors, layout and collectives, in place; returns `gm`.

    before                                              after
    %y = scale_rows(%z, magnitude=m, scale=...)         %z
    """
    for module in subgraph_modules(gm):
        for node in module.graph.find_nodes(op="call_function", target=scale_rows):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        module.recompile()
    return gm
