"""Small tools for editing Dynamo graphs.

Never call `graph.eliminate_dead_code()` on a Dynamo graph: it is not functional. Megatron's attention masks its
scores with an in-place op whose result nobody uses, and elimination would delete it. Erase what a rewrite
replaced, node by node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.utils._pytree import tree_leaves

import dora_fx.version as version

_PACKAGE = Path(version.__file__).parent


def subgraph_modules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield `gm` and every graph module that a higher-order op in it calls, innermost last."""
    yield gm
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            yield from subgraph_modules(child)


def target_name(node: fx.Node) -> str:
    """The name that fx prints for what a node calls; its function for that is private (read in torch 2.11 to 2.15)."""
    return node._pretty_print_target(node.target)


def referenced_graph_maybe(node: fx.Node) -> fx.GraphModule | None:
    """Return the graph module that a `get_attr` node names, None for any other node."""
    if node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    module = getattr(owner, str(node.target), None) if owner is not None else None
    return module if isinstance(module, fx.GraphModule) else None


def fake_value(node: fx.Node) -> Any:
    """Return the fake tensor, number or tuple that Dynamo recorded for a node."""
    return node.meta["example_value"]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in, as the user knows it; "" if none was recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    path = path.replace("L['self']", "").replace("._modules", "").replace("['", ".").replace("']", "")
    return path.lstrip(".")


def source_line(node: fx.Node) -> str:
    """The line outside this package that a node was traced from; "" if none was recorded."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    places = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    return next((place for place in reversed(places) if str(_PACKAGE) not in place), "")


def nodes_of(record: Any) -> list[fx.Node]:
    """Return the nodes in a record, and in the tuples in it, in their order."""
    return [value for value in tree_leaves(record) if isinstance(value, fx.Node)]


def call_like(
    template: fx.Node, function: Callable[..., Any], *args: Any, before: fx.Node | None = None, **kwargs: Any
) -> tuple[Any, list[fx.Node]]:
    """Trace `function` into `template`'s graph, as if `template`'s source line had written it.

    Nodes among the arguments become FX proxies; whatever `function` calls on them becomes a node, with
    `template`'s stack trace and module and a fake value of its own.

    Args:
        before: where the new nodes go, in front of `template` itself by default.

    Returns:
        the function's result with nodes in place of tensors, and all nodes that were made, in order.
    """
    graph, anchor = template.graph, before or template
    tracer = fx.proxy.GraphAppendingTracer(graph)
    previous = anchor.prev
    args, kwargs = fx.map_arg((args, kwargs), lambda node: cast(Any, fx.Proxy(node, tracer)))
    with graph.inserting_before(anchor):
        result = function(*args, **kwargs)
    made = []
    node = previous.next
    while node is not anchor:
        made.append(node)
        node = node.next
    for node in made:
        _give_metadata(node, template)
    return fx.node.map_aggregate(result, lambda part: part.node if isinstance(part, fx.Proxy) else part), made


def _give_metadata(node: fx.Node, template: fx.Node) -> None:
    """Give a new node the metadata that Dynamo gives its own nodes, with the source line and modules of another one."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in template.meta:
            node.meta[key] = template.meta[key]
    args, kwargs = fx.map_arg((node.args, node.kwargs), fake_value)
    # As Dynamo does: a checkpoint around the call would count what is saved here, and not every torch has shapes of
    # products of symbolic sizes otherwise.
    with _mode_of(template), _disable_saved_tensors_hooks_during_tracing(), enable_python_dispatcher():
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _mode_of(node: fx.Node) -> contextlib.AbstractContextManager[Any]:
    """The fake mode of a node's own operands; another graph may be traced under another one at the same time."""
    for operand in node.all_input_nodes:
        value = operand.meta.get("example_value")
        mode = maybe_get_fake_mode(value) if isinstance(value, torch.Tensor) else None
        if mode is not None:
            return mode
    return contextlib.nullcontext()


def erase_nodes(nodes: list[fx.Node]) -> None:
    """Erase nodes that nothing else uses, users first, and the subgraphs that only they referred to."""
    owner = nodes[0].graph.owning_module
    for node in sorted(nodes, reverse=True):
        node.graph.erase_node(node)
        if node.op == "get_attr" and owner is not None:
            target = str(node.target)
            if all(other.target != target for other in owner.graph.find_nodes(op="get_attr", target=target)):
                delattr(owner, target)
