"""What a node of a graph sends to other ranks, in the forward pass and in the backward pass.

Functional collectives, and the bodies of autograd functions, are read. A function of this package is one node, and it
is run on fake tensors with a dispatch mode that sees what it sends; so no list here has to follow the functions.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.utils._pytree import tree_leaves, tree_map

from dora_fx.explanation.collective_calls import (
    CollectiveCall,
    CollectiveRecorder,
    collective_maybe,
    is_collective,
)
from dora_fx.explanation.layer_parts import Message, When
from dora_fx.explanation.node_values import is_own_function, value_of
from dora_fx.passes import referenced_graph_maybe


def messages_of(node: fx.Node) -> tuple[Message, ...]:
    """Return what a node sends, equal messages together, forward first.

    Raises:
        RuntimeError: a process group of the node is not there any more.
    """
    sent = Counter(_sent(node, "forward"))
    return tuple(Message(one.kind, one.when, one.group_size, one.nbytes, count) for one, count in sent.items())


def _sent(node: fx.Node, when: When) -> Iterator[Message]:
    """Yield the messages of a node, which itself runs in the pass `when`."""
    if is_collective(node.target):
        call = collective_maybe(node.target, fx.map_arg(node.args, value_of), value_of(node))
        yield from _messages([] if call is None else [call], when)
    elif is_own_function(node):
        yield from _sent_by_function(node)
    else:
        for position, body in enumerate(filter(None, map(referenced_graph_maybe, node.all_input_nodes))):
            is_backward = node.target is torch.ops.higher_order.autograd_function_apply and position == 1
            for inner in body.graph.nodes:
                yield from _sent(inner, "backward" if is_backward else when)


def _messages(calls: Iterable[CollectiveCall], when: When) -> list[Message]:
    return [Message(call.kind, when, call.num_ranks, call.nbytes) for call in calls]


def _sent_by_function(node: fx.Node) -> list[Message]:
    """Run a function of this package on the fake values of its operands, and its gradient."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    mode = next(filter(None, map(maybe_get_fake_mode, tensors)), None)
    with mode or contextlib.nullcontext(), torch.enable_grad():
        inputs: list[torch.Tensor] = []

        def leaf_of_its_own(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            copy = value.detach().requires_grad_(value.requires_grad)
            inputs.extend([copy] if copy.requires_grad else [])
            return copy

        args, kwargs = tree_map(leaf_of_its_own, (args, kwargs))
        with CollectiveRecorder() as forward:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        with CollectiveRecorder() as backward:
            if outputs and inputs:
                torch.autograd.grad(outputs, inputs, [torch.ones_like(one) for one in outputs], allow_unused=True)
    return _messages(forward.calls, "forward") + _messages(backward.calls, "backward")
