"""Finds the kinds of layers of a stage, and what each is called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dora_fx.explanation.fake_stage import FakeStage, fake_stage, stage_of_model
from dora_fx.explanation.graph_boxes import Kept
from dora_fx.explanation.kept_values import kept_for_backward
from dora_fx.explanation.layer_capture import CapturedGraphs, LayerInputs, capture
from dora_fx.explanation.named_shapes import architecture_named
from dora_fx.explanation.planned_run import PlannedRun
from dora_fx.megatron import walk
from dora_fx.passes import GraphPass, default_passes


@dataclass(frozen=True)
class LayerKind:
    """Layers of a stage that have the same graph.

    Attributes:
        name: of the kind.
        layer: one of them.
        paths: of all of them, in the whole model.
    """

    name: str
    layer: nn.Module
    paths: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class CapturedLayer:
    """One kind of layer with its graphs, of one micro-batch on one rank.

    Attributes:
        name: of the kind.
        count: how many layers of the stage are of it.
        before: Dynamo's graph, in which each adapted layer is a call and a marker.
        after: the same behind the passes. Both carry `example_value` of their nodes.
        kept: what the forward pass keeps for the backward pass, by the nodes of `after`.
    """

    name: str
    count: int
    before: fx.Graph
    after: fx.Graph
    kept: Kept


def captured_layers(base: Any, run: PlannedRun) -> Iterator[CapturedLayer]:
    """Yield each kind of layer of the first pipeline stage with its graphs before and after the passes.

    Args:
        base: see `explain`.
        run: layout, batches and adapters.

    Raises:
        ValueError: as `explain` does.
    """
    with first_stage(base, run) as stage:
        for kind in layer_kinds(stage.model):
            graphs = capture_kind(kind, stage.model, run, default_passes())
            kept = kept_for_backward(graphs.forward.graph, graphs.num_outputs, graphs.names)
            yield CapturedLayer(kind.name, kind.count, graphs.before.graph, graphs.after.graph, kept)


def first_stage(base: Any, run: PlannedRun) -> contextlib.AbstractContextManager[FakeStage]:
    """Return the first pipeline stage of a base, or the one that a model is; checks everything that can be checked."""
    if isinstance(base, nn.Module):
        return stage_of_model(base, run)
    architecture = architecture_named(base)
    run.check_fits(architecture)
    return fake_stage(architecture, run, 0)


def layer_kinds(model: Any) -> list[LayerKind]:
    """Return the kinds of a GPTModel's transformer layers, in the order of their first layers."""
    of_signature: dict[Any, list[tuple[str, nn.Module]]] = {}
    layers = set(model.decoder.layers)
    for named in walk(model):
        if named.module in layers:
            of_signature.setdefault(_signature(named.module), []).append((named.whole_path, named.module))
    groups = list(of_signature.values())
    names = ["layer"] if len(groups) == 1 else [f"layer kind {index + 1}" for index in range(len(groups))]
    return [
        LayerKind(name, group[0][1], tuple(path for path, _ in group))
        for name, group in zip(names, groups, strict=True)
    ]


def _signature(layer: nn.Module) -> Any:
    """What decides a layer's graph: the classes of its modules, and the shapes and dtypes of its parameters."""
    modules = tuple((name, type(module).__qualname__) for name, module in layer.named_modules())
    tensors = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return modules, tensors


def capture_kind(kind: LayerKind, model: Any, run: PlannedRun, passes: list[GraphPass]) -> CapturedGraphs:
    """Capture the layer of a kind; with recomputation, inside its checkpoint, as `compile_model` compiles it."""
    layer = checkpoint_wrapper(kind.layer) if run.recompute else kind.layer
    return capture(layer, layer_inputs(model, run), passes)


def layer_inputs(model: Any, run: PlannedRun) -> LayerInputs:
    """Make what the layers of a GPTModel are called with, under the FakeTensorMode that is active."""
    config, length = model.config, run.sequence_length
    tokens = length // run.tp if config.sequence_parallel else length
    hidden = torch.empty(tokens, run.batch_size, config.hidden_size, dtype=config.params_dtype, requires_grad=True)
    arguments: dict[str, Any] = {"attention_mask": None}
    if any(isinstance(module, DotProductAttention) for module in model.modules()):
        arguments["attention_mask"] = torch.empty(1, 1, length, length, dtype=torch.bool)
        # Megatron takes the scores from a buffer that grows when it must, which a run does before its first layer.
        scores = run.batch_size * config.num_attention_heads // run.tp * length * length
        size = max(scores, length * run.batch_size * config.hidden_size)
        parallel_state.get_global_memory_buffer().get_tensor((size,), config.params_dtype, "mpu")
    if model.position_embedding_type == "rope":
        arguments["rotary_pos_emb"] = torch.empty(length, 1, 1, config.kv_channels)
    return LayerInputs(hidden, arguments)
