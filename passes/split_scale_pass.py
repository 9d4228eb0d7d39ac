"""Scale the parts of a gated layer's output instead of the whole.

    before                                                after
    %y = scale_rows(%z, None, m, delta, ...)              %chunk = torch.chunk(%z, 2, -1)
    %chunk = torch.chunk(%y, 2, -1)                       %m_0, %m_1 = m.chunk(2), ...       the same of delta, ...
    %gate, %up = %chunk                                   %gate = scale_rows(%chunk[0], None, %m_0, ...)
                                                          %up = scale_rows(%chunk[1], None, %m_1, ...)

Each output row has a scale of its own, so scaling and cutting between rows change places. Backward, the activation's
gradient comes in two parts that are joined, and the products take the joined one scaled. A part that is scaled where it
is computed is written once; otherwise the joined gradient is written, read and written again scaled. That would be the
one buffer of the layer's output size that DoRA has and LoRA has not.

Assumes that `scale_rows` runs for a layer without a bias of its own. Leaves alone what has other users, or is cut
otherwise than in equal parts of the features.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dora_fx.function import scale_rows
from dora_fx.passes.graph_utils import call_like, erase_nodes, fake_value, subgraph_modules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitScale:
    """A scaled output that is only ever used in equal parts.

    Attributes:
        scale: the `scale_rows` node.
        chunk: its one user.
        parts: the `getitem` nodes of the chunks, with the part that each takes.
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
    return [found for found in map(_describe_maybe, scales) if found is not None]


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
    output, _, *per_row = split.scale.args
    used = sorted({part for _, part in split.parts})
    scaled, _ = call_like(split.chunk, _scale_parts, output, per_row, split.num_parts, used)
    for node, part in split.parts:
        node.replace_all_uses_with(scaled[used.index(part)])
    erase_nodes([split.scale, split.chunk, *(node for node, _ in split.parts)])


def _scale_parts(
    output: torch.Tensor, per_row: Sequence[torch.Tensor], num_parts: int, used: Sequence[int]
) -> list[torch.Tensor]:
    parts = torch.chunk(output, num_parts, -1)
    rows = [values.chunk(num_parts) for values in per_row]
    return [scale_rows(parts[part], None, *(values[part] for values in rows)) for part in used]


def _describe_maybe(scale: fx.Node) -> SplitScale | None:
    _, bias, *_ = scale.args
    if bias is not None or len(scale.users) != 1:
        return None
    [chunk] = scale.users
    if chunk.target not in (torch.chunk, "chunk"):
        return None
    # torch.chunk(input, chunks, dim=0), by position or by name.
    given = dict(zip(("input", "chunks", "dim"), chunk.args, strict=False)) | chunk.kwargs
    num_parts, dim, value = given["chunks"], given.get("dim", 0), fake_value(scale)
    if not isinstance(num_parts, int) or dim not in (-1, value.dim() - 1) or value.shape[-1] % num_parts:
        return None
    parts = [(user, user.args[1]) for user in chunk.users if user.target is operator.getitem]
    if len(parts) != len(chunk.users):
        return None
    return SplitScale(scale, chunk, tuple((user, int(part)) for user, part in parts), num_parts)  # type: ignore[arg-type]
