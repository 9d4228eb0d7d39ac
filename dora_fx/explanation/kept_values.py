"""What a compiled graph keeps for its backward pass, by the nodes of the graph that it was compiled from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from dora_fx.explanation.layer_parts import TensorFacts
from dora_fx.explanation.node_values import facts_of, is_tensor, value_of, viewed_maybe
from dora_fx.passes import referenced_graph_maybe, subgraph_modules

# The `id` of a graph, and the name of a node in it, which are what AOTAutograd notes of where a node comes from.
NodeNames = Mapping[tuple[int, str], str]


def names_in_layer(gm: fx.GraphModule) -> NodeNames:
    """Return what a description calls the nodes of a Dynamo graph and of the bodies in it.

    A node in the body of a checkpoint has that body's name before its own, and one in the body of an autograd function
    is a part of the call, whose name it has.

    Args:
        gm: the graph, which has to stay alive for as long as the result is used.
    """
    return dict(_names(gm, ""))


def _names(gm: fx.GraphModule, prefix: str) -> Iterator[tuple[tuple[int, str], str]]:
    for node in gm.graph.nodes:
        yield (id(gm.graph), node.name), prefix + node.name
        is_function = node.target is torch.ops.higher_order.autograd_function_apply
        for operand in node.all_input_nodes:
            if (body := referenced_graph_maybe(operand)) is None:
                continue
            if not is_function:
                yield from _names(body, f"{prefix}{operand.name}.")
                continue
            for inner in subgraph_modules(body):
                for part in inner.graph.nodes:
                    yield (id(inner.graph), part.name), prefix + node.name


def kept_for_backward(forward: fx.Graph, num_outputs: int, names: NodeNames) -> dict[str, tuple[TensorFacts, ...]]:
    """Return what a forward graph hands to its backward graph, without the graph's own inputs and views of them.

    Args:
        forward: an ATen graph of AOTAutograd's partitioner.
        num_outputs: how many of its outputs the caller gets; the others are kept.
        names: the `names_in_layer` of the Dynamo graph.

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
        source = _source_maybe(node)
        name = node.name if source is None else names.get((source.graph_id, source.name), source.name)
        by_name[name] = (*by_name.get(name, ()), _facts(node))
    return by_name


def _source_maybe(node: fx.Node) -> Any:
    """Return where a node comes from, in AOTAutograd's words; None where that was not noted.

    A state of random numbers, which a recomputation begins with, comes from where the result beside it does.
    """
    beside = [other for call in node.all_input_nodes[:1] for other in call.users if _is_random_state(node)]
    return next((found[0] for each in (node, *beside) if (found := each.meta.get("from_node"))), None)


def _facts(node: fx.Node) -> TensorFacts:
    if not _is_random_state(node):
        return facts_of(value_of(node))
    # Its length is a symbol, whose value is the generator's that was there.
    length = int(value_of(node).numel())
    return TensorFacts((length,), "u8", length)


def _is_random_state(node: fx.Node) -> bool:
    calls = node.all_input_nodes
    saves_state = bool(calls) and calls[0].target is torch.ops.higher_order.run_and_save_rng_state
    return saves_state and node.args[1:] == (0,)
