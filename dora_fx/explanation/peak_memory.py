"""Estimates the peak memory of a graph as Inductor schedules it, without compiling anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.memory import FreeableInputBuffer, estimate_peak_memory, get_freeable_input_buf
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

from dora_fx.explanation.layer_capture import copied_graph


class SavedMemory(NamedTuple):
    """The memory of an input of a backward graph, which may be a view.

    Attributes:
        owner: the node of the forward graph that it belongs to.
        num_bytes: all of it.
    """

    owner: str
    num_bytes: int


def estimated_peak(gm: fx.GraphModule, saved: Mapping[str, SavedMemory] | None = None) -> int:
    """Return the bytes that a graph has allocated at its worst moment, without parameters and inputs that stay.

    Inputs of a backward graph count until their last use: they are what the forward pass saved.

    Args:
        gm: a forward or backward graph of AOTAutograd, on a CPU; it is not changed.
        saved: of a backward graph, the memory of its inputs by their names; None for a forward graph.
    """
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    mode = _mode_of(inputs)
    # Inductor has no mode around it when it lowers a graph, and makes real constants.
    with _disable_current_modes(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering = GraphLowering(
            copied_graph(gm), example_inputs=inputs, is_inference=False, is_backward=saved is not None
        )
        with V.set_graph_handler(lowering):
            return _scheduled_peak(lowering, inputs, saved or {})


def _scheduled_peak(lowering: GraphLowering, inputs: list[Any], saved: Mapping[str, SavedMemory]) -> int:
    lowering.run(*inputs)
    lowering.init_wrapper_code()
    lowering._update_scheduler()
    nodes = lowering.scheduler.nodes
    freeable = get_freeable_input_buf(nodes, OrderedSet(lowering.graph_inputs.keys()))
    _count_whole_memory(freeable, saved)
    _, live = estimate_peak_memory(nodes, freeable, OrderedSet(lowering.get_output_names()))
    # The list has one more entry, behind the last node.
    sizes = (size - _bytes_in_registers(node) for size, node in zip(live, nodes, strict=False))
    return int(max(sizes, default=0))


def _count_whole_memory(freeable: Mapping[str, FreeableInputBuffer], saved: Mapping[str, SavedMemory]) -> None:
    """Let each memory count once, and whole, until the last use of its last view.

    Inductor counts what the last node that reads an input reads of it: of a product that is split a half.
    """
    first_of: dict[str, Any] = {}
    for name, buffer in freeable.items():
        if name not in saved:
            continue
        owner, num_bytes = saved[name]
        planned, first = buffer.mpi_buffer, first_of.setdefault(owner, buffer.mpi_buffer)
        planned.size_free = num_bytes if planned is first else 0
        first.succ_nodes |= planned.succ_nodes
        first.succ_nodes_for_ordering |= planned.succ_nodes_for_ordering


def _bytes_in_registers(node: BaseSchedulerNode) -> int:
    """Return the bytes of what fused operations hand to each other alone, which is never written to memory."""
    names = OrderedSet(part.get_name() for part in node.get_nodes())
    return sum(
        buffer.mpi_buffer.size_alloc
        for buffer in node.get_outputs()
        if len(names) > 1 and node.scheduler.can_buffer_be_removed_through_fusion(buffer.get_name(), names)
    )


def _mode_of(inputs: list[Any]) -> FakeTensorMode:
    return next(value.fake_mode for value in inputs if isinstance(value, torch._subclasses.FakeTensor))
