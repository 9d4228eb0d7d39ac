"""Scale the parts of an output that is cut instead of the whole.

    before                                                after
    %y = scale_rows(%z, magnitude=m, scale=...)           %split = %z.split((a, b), -1)
    %chunk = torch.chunk(%y, 2, -1)                       %m_0, %m_1 = m.split((a, b), -1)    as of the scale's tensors
    %gate, %up = %chunk                                   %gate = scale_rows(%split[0], magnitude=%m_0, scale=...)
                                                          %up = scale_rows(%split[1], magnitude=%m_1, scale=...)

Each output row has a scale of its own, so the output may be scaled before it is cut or after. Gated layers are cut
into gate and up. The output of a layer of attention is viewed as `[s, b, groups, out/groups]` first, then cut into
queries, keys and values; m and the scale's tensors are viewed as `[groups, out/groups]` for that.

In the backward pass the gradient comes in parts. Here each part is scaled where it is computed, and the products take
the parts joined. With one scale for the whole output, the parts would be joined and written first, then read and
written again scaled: a buffer of the layer's output size that LoRA does not need. In the forward pass attention keeps
the values as they are: as a part of one scaled output they would keep the queries and keys beside them.

Assumes that the layer adds no bias of its own. Leaves alone an output that has other users, one that is cut along
another dimension than the last one of its features, and one with scales of each sample or token.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dora_fx.function import RowScale, scale_rows
from dora_fx.passes.graph_utils import call_like, erase_nodes, fake_value, subgraph_modules

logger = logging.getLogger(__name__)

_CUTS = (torch.chunk, "chunk", torch.split, "split")


@dataclass(frozen=True)
class SplitScale:
    """A scaled output whose parts alone are used.

    Attributes:
        scale: the `scale_rows` node.
        views: in front of the cut, each the one user of the node before it.
        cut: the one user of the last of them.
        parts: the `getitem` nodes of the parts, with the index of the part that each takes.
        features: the dimensions that the output's features have in the cut, whose last one is cut.
        sizes: of all parts in that one.
    """

    scale: fx.Node
    views: tuple[fx.Node, ...]
    cut: fx.Node
    parts: tuple[tuple[fx.Node, int], ...]
    features: tuple[int, ...]
    sizes: tuple[int, ...]


def find_split_scales(gm: fx.GraphModule) -> list[SplitScale]:
    """Every scale of a graph and the subgraphs it calls whose output is cut into parts of its features."""
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
    logger.info("split %d scales of outputs that are cut", len(found))
    return gm


def rewrite_split_scale(split: SplitScale) -> None:
    """Replace one scale, and the views and the cut of its output, by these and a scale of each part."""
    used = sorted({part for _, part in split.parts})
    scaled, _ = call_like(
        split.cut,
        _scale_parts,
        split.scale.args[0],
        magnitude=split.scale.kwargs["magnitude"],
        scale=split.scale.kwargs["scale"],
        views=[view.args[1:] for view in split.views],
        features=split.features,
        sizes=split.sizes,
        used=used,
    )
    for node, part in split.parts:
        node.replace_all_uses_with(scaled[used.index(part)])
    erase_nodes([split.scale, *split.views, split.cut, *(node for node, _ in split.parts)])


def _scale_parts(
    output: torch.Tensor,
    *,
    magnitude: torch.Tensor,
    scale: RowScale,
    views: Sequence[Any],
    features: Sequence[int],
    sizes: Sequence[int],
    used: Sequence[int],
) -> list[torch.Tensor]:
    for shape in views:
        output = output.reshape(*shape)
    rows = [magnitude, *scale]
    if len(features) > 1:
        rows = [values.view(*features) for values in rows]
    outputs, (magnitudes, *fields) = output.split(sizes, -1), [values.split(sizes, -1) for values in rows]
    return [
        scale_rows(
            outputs[part], bias=None, magnitude=magnitudes[part], scale=RowScale(*(values[part] for values in fields))
        )
        for part in used
    ]


def _split_maybe(scale: fx.Node) -> SplitScale | None:
    magnitude = scale.kwargs["magnitude"]
    if scale.kwargs["bias"] is not None or not isinstance(magnitude, fx.Node):
        return None
    # In a mixed batch each token has a magnitude.
    if fake_value(magnitude).dim() != 1:
        return None
    views: list[fx.Node] = []
    last, user = scale, _one_user_maybe(scale)
    while user is not None and _is_view(user):
        views.append(user)
        last, user = user, _one_user_maybe(user)
    features = _features_maybe(fake_value(last), fake_value(scale).shape[-1])
    if user is None or features is None or user.target not in _CUTS:
        return None
    # torch.chunk(input, chunks, dim=0) and torch.split(tensor, split_size_or_sections, dim=0), by position or by name.
    dim = user.args[2] if len(user.args) > 2 else user.kwargs.get("dim", 0)
    if dim not in (-1, fake_value(last).dim() - 1):
        return None
    sizes = tuple(value.shape[-1] for value in fake_value(user))
    parts = []
    for taken in user.users:
        index = taken.args[1] if taken.target is operator.getitem else None
        if not isinstance(index, int):
            return None
        parts.append((taken, index % len(sizes)))
    return SplitScale(scale, tuple(views), user, tuple(parts), features, sizes)


def _one_user_maybe(node: fx.Node) -> fx.Node | None:
    """Return the node that alone uses a node, as its first operand and nothing else."""
    if len(node.users) != 1:
        return None
    [user] = node.users
    return user if user.args and user.args[0] is node else None


def _is_view(node: fx.Node) -> bool:
    """Return whether a node gives its first operand another shape; a view may also read it as another dtype."""
    if node.op != "call_method" or node.target not in ("view", "reshape") or node.kwargs:
        return False
    return all(isinstance(size, (int, fx.Node, tuple, list)) for size in node.args[1:])


def _features_maybe(value: torch.Tensor, num_features: int) -> tuple[int, ...] | None:
    """Return the last dimensions of a value that together are the features; None if a view mixed them with tokens."""
    for first in range(value.dim() - 1, -1, -1):
        dims = value.shape[first:]
        if not all(isinstance(size, int) for size in dims) or math.prod(dims) > num_features:
            return None
        if math.prod(dims) == num_features:
            return tuple(dims)
    return None
