"""What a compiled graph keeps for its backward pass, by the nodes of the graph that it was compiled from."""

from __future__ import annotations

from torch import fx

from dora_fx.explanation.layer_parts import TensorFacts
from dora_fx.explanation.node_values import facts_of, is_tensor, value_of, viewed_maybe


def kept_for_backward(forward: fx.Graph, num_outputs: int) -> dict[str, tuple[TensorFacts, ...]]:
    """Return what a forward graph hands to its backward graph, without the graph's own inputs and views of them.

    Args:
        forward: an ATen graph of AOTAutograd's partitioner.
        num_outputs: how many of its outputs the caller gets; the others are kept.

    Returns:
        the kept tensors, each once and whole where only a part or a view of it is handed over, by the name of the
        Dynamo node that computes it.
    """
    [outputs] = forward.find_nodes(op="output")[0].args
    kept: dict[fx.Node, None] = {}
    for node in outputs[num_outputs:]:
        if isinstance(node, fx.Node) and is_tensor(node):
            whole, viewed = node, viewed_maybe(node)
            while viewed is not None:
                # Parts of a split are views, and outputs of an operator with several, such as fused attention, are not.
                whole = viewed if is_tensor(viewed) else whole
                viewed = viewed_maybe(viewed)
            if whole.op != "placeholder":
                kept[whole] = None
    by_name: dict[str, tuple[TensorFacts, ...]] = {}
    for node in kept:
        sources = node.meta.get("from_node") or []
        name = sources[0].name if sources else node.name
        by_name[name] = (*by_name.get(name, ()), facts_of(value_of(node)))
    return by_name
