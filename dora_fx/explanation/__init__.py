"""What adapters add to a layer, from its graphs: descriptions, pictures and trees."""

from dora_fx.explanation.kept_values import kept_for_backward
from dora_fx.explanation.layer_description import describe_layer
from dora_fx.explanation.layer_parts import (
    Box,
    Edge,
    GraphDescription,
    LayerDescription,
    Message,
    Operand,
    TensorFacts,
)
from dora_fx.explanation.picture import draw, draw_layer
from dora_fx.explanation.tree import layer_tree, tree_of

__all__ = [
    "Box",
    "Edge",
    "GraphDescription",
    "LayerDescription",
    "Message",
    "Operand",
    "TensorFacts",
    "describe_layer",
    "draw",
    "draw_layer",
    "kept_for_backward",
    "layer_tree",
    "tree_of",
]
