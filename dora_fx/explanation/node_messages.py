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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dora_fx.explanation.layer_parts import Message, When
from dora_fx.explanation.node_values import is_collective, is_own_function, num_bytes_maybe, value_of
from dora_fx.passes import referenced_graph_maybe
from dora_fx.ranks import group_size

_KINDS = ("all_reduce", "all_gather", "reduce_scatter")


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
        yield _message(node.target, when, node.args, fx.map_arg(node.args, value_of), value_of(node))
    elif is_own_function(node):
        yield from _sent_by_function(node)
    else:
        for position, body in enumerate(filter(None, map(referenced_graph_maybe, node.all_input_nodes))):
            is_backward = node.target is torch.ops.higher_order.autograd_function_apply and position == 1
            for inner in body.graph.nodes:
                yield from _sent(inner, "backward" if is_backward else when)


def _message(target: Any, when: When, arguments: Iterable[Any], *values: Any) -> Message:
    """The one message of a functional collective, whose last argument is the name of its group."""
    name = str(getattr(target, "__name__", target))
    kind = next((kind for kind in _KINDS if name.startswith(kind)), name.partition(".")[0])
    sides = [num_bytes_maybe(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    known = [side for side in sides if side is not None]
    nbytes = max(known) if len(known) == len(sides) else None
    return Message(kind, when, group_size(list(arguments)[-1]), nbytes)


class _Recorder(TorchDispatchMode):
    """Keeps the messages of functional collectives; a group of one rank sends nothing."""

    def __init__(self, when: When) -> None:
        super().__init__()
        self.when = when
        self.sent: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_collective(func):
            message = _message(func, self.when, args, args, result)
            self.sent += [message] if message.group_size > 1 else []
        return result


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
        with _Recorder("forward") as forward:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        with _Recorder("backward") as backward:
            if outputs and inputs:
                torch.autograd.grad(outputs, inputs, [torch.ones_like(one) for one in outputs], allow_unused=True)
    return forward.sent + backward.sent
