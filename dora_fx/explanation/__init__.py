"""What a run costs, before it runs, from graphs on tensors without values; a layer's graphs as pictures and trees."""

from dora_fx.explanation.cost_records import (
    VARIANTS,
    Collective,
    Explanation,
    KindCosts,
    LayerCosts,
    Memory,
    StageCosts,
)
from dora_fx.explanation.kept_values import kept_for_backward, names_in_layer
from dora_fx.explanation.layer_description import describe_layer
from dora_fx.explanation.layer_kinds import CapturedLayer, captured_layers
from dora_fx.explanation.layer_parts import (
    Box,
    Edge,
    GraphDescription,
    LayerDescription,
    Message,
    Operand,
    TensorFacts,
)
from dora_fx.explanation.named_shapes import NAMED_SHAPES, architecture_named
from dora_fx.explanation.picture import draw, draw_layer
from dora_fx.explanation.planned_run import RUN_FIELDS, PlannedRun
from dora_fx.explanation.tree import layer_tree, tree_of
from dora_fx.explanation.whole_run import explain

__all__ = [
    "NAMED_SHAPES",
    "RUN_FIELDS",
    "VARIANTS",
    "Box",
    "CapturedLayer",
    "Collective",
    "Edge",
    "Explanation",
    "GraphDescription",
    "KindCosts",
    "LayerCosts",
    "LayerDescription",
    "Memory",
    "Message",
    "Operand",
    "PlannedRun",
    "StageCosts",
    "TensorFacts",
    "architecture_named",
    "captured_layers",
    "describe_layer",
    "draw",
    "draw_layer",
    "explain",
    "kept_for_backward",
    "layer_tree",
    "names_in_layer",
    "tree_of",
]
