"""Scale the parts of a gated layer's output instead of the whole.

    before                                                after
    %y = scale_rows(%z, magnitude=m, scale=...)           %chunk = torch.chunk(%z, 2, -1)
    %chunk = torch.chunk(%y, 2, -1)                       %m_0, %m_1 = m.chunk(2)         as of the scale's tensors
    %gate, %up = %chunk                                   %gate = scale_rows(%chunk[0], magnitude=%m_0, scale=...)
                                                          %up = scale_rows(%chunk[1], magnitude=%m_1, scale=...)

Each output row has a scale of its own, so the output may be scaled before it is cut or after. In the backward pass the
activation's gradient comes in parts. Here each part is scaled where it is computed, and the products take the parts
joined. With one scale for the whole output, the parts would be joined and written first, then read and written again
scaled: a buffer of the layer's output size that LoRA does not need.

Assumes that the layer adds no bias of its own. Leaves alone an output that has other users, one that is cut along
another dimension than the features or into parts of different sizes, and one with scales of each sample or token.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dora_fx.function import RowScale, scale_rows
from dora_fx.passes.graph_utils import call_like, erase_nodes, fake_value, subgraph_modules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitScale:
    """A scaled output whose equal parts alone are used.

    Attributes:
        scale: the `scale_rows` node.
        chunk: its one user.
        parts: the `getitem` nodes of the chunks, with the index of the part that each takes.
        num_parts: how many parts the features are cut into.
    """

    scale: fx.Node
    chunk: fx.Node
    parts: tuple[tuple[fx.Node, int], ...]
    num_parts: int


def find_split_scales(gm: fx.GraphModule) -> list[SplitScale]:
    """Every scale of a graph and the subgraphs it calls whose output is cut into equal parts of its features."""
    scales = [
        node
        for module in subgraph_modules(gm)
        for node in module.graph.find_nodes(op="call_function", target=scale_rows)
    ]
    return [found for found in map(_split_maybe, scales) if found is not None]


def split_scale_pass(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Move every scale behind the cut of its output, in place; returns `gm`."""
    found = find_split_scales(gm)
    if not found:
        return gm
    for split in found:
        rewrite_split_scale(split)
    for module in {split.scale.graph.owning_module for split in found} | {gm}:
        assert module is not None
        module.graph.lint()
        module.recompile()
    logger.info("split %d scales of gated layers", len(found))
    return gm


def rewrite_split_scale(split: SplitScale) -> None:
    """Replace one scale, and the cut of its output, by the cut and a scale of each part."""
    used = sorted({part for _, part in split.parts})
    scaled, _ = call_like(
        split.chunk,
        _scale_parts,
        split.scale.args[0],
        magnitude=split.scale.kwargs["magnitude"],
        scale=split.scale.kwargs["scale"],
        num_parts=split.num_parts,
        used=used,
    )
    for node, part in split.parts:
        node.replace_all_uses_with(scaled[used.index(part)])
    erase_nodes([split.scale, split.chunk, *(node for node, _ in split.parts)])


def _scale_parts(
    output: torch.Tensor, *, magnitude: torch.Tensor, scale: RowScale, num_parts: int, used: Sequence[int]
) -> list[torch.Tensor]:
    outputs, magnitudes = torch.chunk(output, num_parts, -1), magnitude.chunk(num_parts)
    fields = [values.chunk(num_parts) for values in scale]
    return [
        scale_rows(
            outputs[part], bias=None, magnitude=magnitudes[part], scale=RowScale(*(values[part] for values in fields))
        )
        for part in used
    ]


def _split_maybe(scale: fx.Node) -> SplitScale | None:
    magnitude = scale.kwargs["magnitude"]
    if scale.kwargs["bias"] is not None or len(scale.users) != 1 or not isinstance(magnitude, fx.Node):
        return None
    # In a mixed batch each token has a magnitude.
    if fake_value(magnitude).dim() != 1:
        return None
    [chunk] = scale.users
    if chunk.target not in (torch.chunk, "chunk"):
        return None
    # torch.chunk(input, chunks, dim=0), by position or by name.
    given = dict(zip(("input", "chunks", "dim"), chunk.args, strict=False)) | chunk.kwargs
    num_parts, dim, value = given["chunks"], given.get("dim", 0), fake_value(scale)
    if not isinstance(num_parts, int) or dim not in (-1, value.dim() - 1) or value.shape[-1] % num_parts:
        return None
    parts = []
    for user in chunk.users:
        index = user.args[1] if user.target is operator.getitem else None
        if not isinstance(index, int):
            return None
        parts.append((user, index % num_parts))
    return SplitScale(scale, chunk, tuple(parts), num_parts)
