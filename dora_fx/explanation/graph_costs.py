"""Counts what the forward and backward graphs of a layer compute, send and keep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dora_fx.explanation.collective_calls import CollectiveCall, collective_maybe
from dora_fx.explanation.cost_records import Collective, LayerCosts, PassCosts, SavedTensor
from dora_fx.explanation.layer_capture import CapturedGraphs, results_of
from dora_fx.explanation.peak_memory import SavedMemory, estimated_peak

_aten = torch.ops.aten
_VIEWS = {
    *("view", "permute", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "alias"),
    *("split_with_sizes", "unbind", "as_strided", "detach", "_unsafe_view", "reshape", "getitem", "wait_tensor"),
}
_GROUPS: dict[str, Callable[[], Any]] = {
    "tp": partial(parallel_state.get_tensor_model_parallel_group, check_initialized=False),
    "pp": partial(parallel_state.get_pipeline_model_parallel_group, check_initialized=False),
    "cp": partial(parallel_state.get_context_parallel_group, check_initialized=False),
    "dp": parallel_state.get_data_parallel_group,
    "ep": partial(parallel_state.get_expert_model_parallel_group, check_initialized=False),
    "etp": partial(parallel_state.get_expert_tensor_parallel_group, check_initialized=False),
}


def _attention_flops(query: Any, key: Any, products: int) -> int:
    """Operations of the products `[.., s, d] x [.., d, s]` of attention; all scores count, as torch counts them."""
    batch, heads, length, features = query.shape
    return 2 * products * int(batch * heads * length * key.shape[2] * features)


# torch counts no operations of attention on a CPU. The backward pass computes the scores again.
_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *others, **named: _attention_flops(q, k, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, *others, **named: _attention_flops(q, k, 5)
    ),
}


class _Call(NamedTuple):
    """An operator's call in a graph, unwrapped from `run_and_save_rng_state` and the like."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def layer_costs(graphs: CapturedGraphs) -> LayerCosts:
    """Count the graphs of one layer."""
    if graphs.backward is None:
        return LayerCosts(forward=_pass_costs(graphs.forward), backward=PassCosts(0, (), 0), saved=())
    saved = saved_tensors(graphs)
    return LayerCosts(
        forward=_pass_costs(graphs.forward), backward=_pass_costs(graphs.backward, _saved_memory(graphs)), saved=saved
    )


def _pass_costs(gm: fx.GraphModule, saved: Mapping[str, SavedMemory] | None = None) -> PassCosts:
    calls = list(_calls(gm.graph))
    return PassCosts(
        flops=sum(map(_flops, calls)),
        collectives=collectives_of(gm.graph),
        peak_bytes=estimated_peak(gm, saved),
    )


def _calls(graph: fx.Graph) -> Iterator[_Call]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        target, args = node.target, node.args
        name = getattr(target, "__name__", "")
        if name in ("run_and_save_rng_state", "run_with_rng_state"):
            skipped = 1 if name == "run_with_rng_state" else 0
            target, args = args[skipped], args[skipped + 1 :]
        yield _Call(node, target, tuple(args), dict(node.kwargs))


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _flops(call: _Call) -> int:
    packet = getattr(call.target, "overloadpacket", None)
    count = _ATTENTION.get(packet) or flop_registry.get(packet)
    if count is None:
        return 0
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), _value)
    return int(count(*args, **kwargs, out_val=_value(call.node)))


def collectives_of(graph: fx.Graph) -> tuple[Collective, ...]:
    """Return the collectives of a graph, equal ones together, the largest first."""
    found: Counter[tuple[Any, ...]] = Counter()
    for call in _calls(graph):
        sent = collective_maybe(call.target, fx.map_arg(call.args, _value), _value(call.node))
        if sent is not None:
            found[_described(sent, site_of(call.node))] += 1
    return in_order(found)


def counted(calls: Iterable[CollectiveCall]) -> tuple[Collective, ...]:
    """Return the collectives that eager code called, equal ones together, the largest first."""
    return in_order(Counter(_described(call, "") for call in calls))


def _described(call: CollectiveCall, site: str) -> tuple[Any, ...]:
    """Return the (kind, bytes, group, ranks, site) of a collective that a module at a path belongs to."""
    return call.kind, max(bytes_of(call.inputs), bytes_of(call.outputs)), group_named(call.group), call.num_ranks, site


def in_order(found: Counter[tuple[Any, ...]]) -> tuple[Collective, ...]:
    """Make records of counts of (kind, bytes, group, ranks, site), the largest messages first."""
    records = [
        Collective(kind, num_bytes, count, group, ranks, site)
        for (kind, num_bytes, group, ranks, site), count in found.items()
    ]
    return tuple(sorted(records, key=lambda one: (-one.num_bytes, one.kind, one.site)))


def _name_of(target: Any) -> tuple[str, str]:
    """Return an operator's namespace and name; of any other function its name."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return "", getattr(target, "__name__", str(target))
    namespace, _, name = schema.name.partition("::")
    return namespace, name


def group_named(group: str) -> str:
    """Return what Megatron calls a process group, or its own name."""
    for name, get in _GROUPS.items():
        found = get()
        if found is not None and found.group_name == group:
            return name
    return group


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a value."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    # Dynamo may have made a symbol of a size, which has the value that was traced.
    return sum(int(tensor.numel()) * tensor.element_size() for tensor in tensors)


def site_of(node: fx.Node) -> str:
    """Return the path, in its layer, of the module that a node computes for; empty where that is not recorded."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next(reversed([path for path, _ in stack.values()]), "")
    # Dynamo spells it as an expression: L['layer']._modules['mlp'].linear_fc1, or with dots alone.
    words: list[str] = re.findall(r"\w+", path)
    unwanted = {"L", "layer", "fn", "self", "_modules", "modules", "to_wrap", "_checkpoint_wrapped_module", "_orig_mod"}
    return ".".join(word for word in words if word not in unwanted)


def saved_tensors(graphs: CapturedGraphs) -> tuple[SavedTensor, ...]:
    """Return what the forward graph keeps for the backward graph, the largest first, each memory once.

    Parameters, buffers and what all layers share are the model's and not this layer's; the hidden states that came in
    are kept for this layer alone.
    """
    placeholders = graphs.forward.graph.find_nodes(op="placeholder")
    hidden = placeholders[graphs.hidden_index]
    kept: dict[fx.Node, SavedTensor] = {}
    for node in results_of(graphs.forward.graph)[graphs.num_outputs :]:
        if not isinstance(node, fx.Node):
            continue
        source = _owner(node)
        value = _value(source)
        if source in kept or not isinstance(value, torch.Tensor) or (source.op == "placeholder" and source != hidden):
            continue
        site = "" if source is hidden else site_of(source) or "layer"
        name = "hidden_states" if source is hidden else source.name
        kept[source] = SavedTensor(name, site, tuple(map(int, value.shape)), str(value.dtype)[6:], bytes_of(value))
    return tuple(sorted(kept.values(), key=lambda tensor: -tensor.num_bytes))


def _saved_memory(graphs: CapturedGraphs) -> dict[str, SavedMemory]:
    """Return whose memory the inputs of the backward graph are, by their names; an input of both graphs stays."""
    saved = [node for node in results_of(graphs.forward.graph)[graphs.num_outputs :] if isinstance(node, fx.Node)]
    owners = {node.name: _owner(node) for node in saved}
    return {
        name: SavedMemory(owner.name, 0 if owner.op == "placeholder" else bytes_of(_value(owner)))
        for name, owner in owners.items()
    }


def _owner(node: fx.Node) -> fx.Node:
    """Return the node whose memory a node is a view of."""
    while node.op == "call_function" and _name_of(node.target)[1] in _VIEWS:
        source = node.all_input_nodes[0]
        is_one_of_several = _name_of(node.target)[1] == "getitem" and not isinstance(_value(source), torch.Tensor)
        if is_one_of_several and (_name_of(source.target)[1] == "getitem" or not _is_view(source)):
            # Each output of such an operator has a memory of its own.
            return node
        node = source
    return node


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and _name_of(node.target)[1] in _VIEWS
