"""Estimates the peak memory of a graph as Inductor schedules it, without compiling anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.memory import estimate_peak_memory, get_freeable_input_buf
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes

from dora_fx.explanation.layer_capture import copied_graph


def estimated_peak(gm: fx.GraphModule, *, is_backward: bool) -> int:
    """Return the bytes that a graph has allocated at its worst moment, without parameters and inputs that stay.

    Inputs of a backward graph count until their last use: they are what the forward pass saved.

    Args:
        gm: a forward or backward graph of AOTAutograd, on a CPU; it is not changed.
        is_backward: whether it is a backward graph.
    """
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    mode = _mode_of(inputs)
    # Inductor has no mode around it when it lowers a graph, and makes real constants.
    with _disable_current_modes(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering = GraphLowering(copied_graph(gm), example_inputs=inputs, is_inference=False, is_backward=is_backward)
        with V.set_graph_handler(lowering):
            return _scheduled_peak(lowering, inputs)


def _scheduled_peak(lowering: GraphLowering, inputs: list[Any]) -> int:
    lowering.run(*inputs)
    lowering.init_wrapper_code()
    lowering._update_scheduler()
    nodes = lowering.scheduler.nodes
    freeable = get_freeable_input_buf(nodes, OrderedSet(lowering.graph_inputs.keys()))
    peak, _ = estimate_peak_memory(nodes, freeable, OrderedSet(lowering.get_output_names()))
    return int(peak)


def _mode_of(inputs: list[Any]) -> FakeTensorMode:
    return next(value.fake_mode for value in inputs if isinstance(value, torch._subclasses.FakeTensor))
