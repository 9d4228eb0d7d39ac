"""Differentiable tensor-parallel collectives that Dynamo, AOTAutograd and Inductor can trace.

Megatron's own mappings allocate their outputs by hand and write into them in place. These are built on the
functional collectives, so a compiler can reorder and fuse around them. Each takes the name of a process
group; with one rank it returns its input. Gradients follow Megatron's convention for tensors that are
replicated over the tensor-parallel group: every rank holds the whole gradient.

All of them record themselves as one node when they meet an `torch.fx.Proxy`, so that a rewritten graph
reads like the layout table of `placement.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from dora_fx.ranks import group_rank, group_size

_ops = torch.ops._c10d_functional


def _all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group_name))


def _all_gather(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group_size(group_name), group_name))


def _reduce_scatter(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group_size(group_name), group_name))


def _split_last(x: torch.Tensor, group_name: str) -> torch.Tensor:
    width = x.shape[-1] // group_size(group_name)
    return x.narrow(-1, group_rank(group_name) * width, width).contiguous()


def _gather_last(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.cat(_all_gather(x, group_name).chunk(group_size(group_name), 0), -1)


def _identity(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return x.view_as(x)


Mapping = Callable[[torch.Tensor, str], torch.Tensor]


def _differentiable(name: str, forward: Mapping, backward: Mapping, doc: str) -> Mapping:
    """Join two mappings, each the other's transpose, into one differentiable function."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, group_name: str) -> torch.Tensor:
            ctx.group_name = group_name
            return forward(x, group_name)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            return backward(grads[0], ctx.group_name), None

    def collective(x: torch.Tensor, group_name: str) -> torch.Tensor:
        if group_size(group_name) == 1:
            return x
        if has_torch_function_unary(x):
            return handle_torch_function(collective, (x,), x, group_name)
        return Collective.apply(x, group_name)

    collective.__name__ = collective.__qualname__ = Collective.__qualname__ = name
    collective.__doc__ = doc
    return collective


copy_to_group = _differentiable(
    "copy_to_group", _identity, _all_reduce, "Replicated in, replicated out; the gradient is all-reduced."
)
reduce_from_group = _differentiable(
    "reduce_from_group", _all_reduce, _identity, "Partial sums in, their sum on every rank out."
)
gather_sequence = _differentiable(
    "gather_sequence",
    _all_gather,
    _reduce_scatter,
    "`[s/tp, ...]` to `[s, ...]` along dimension 0; the gradient is reduce-scattered.",
)
reduce_scatter_sequence = _differentiable(
    "reduce_scatter_sequence",
    _reduce_scatter,
    _all_gather,
    "Partial sums `[s, ...]` to their sum's own shard `[s/tp, ...]`; the gradient is all-gathered.",
)
split_features = _differentiable(
    "split_features", _split_last, _gather_last, "`[..., h]` to this rank's `[..., h/tp]`; gradients are gathered."
)
gather_features = _differentiable(
    "gather_features", _gather_last, _split_last, "`[..., h/tp]` to `[..., h]`; this rank keeps its own gradient."
)


def all_reduce_coalesced(tensors: Sequence[torch.Tensor], group_name: str) -> tuple[torch.Tensor, ...]:
    """Partial sums in, their sums on every rank out, in one message and without gradients."""
    # Of several dtypes all travel, and are added up, in the widest.
    total = _all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), group_name)
    parts = total.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))


def _all_gather_rows(tensors: Sequence[torch.Tensor], group_name: str) -> tuple[torch.Tensor, ...]:
    ranks = group_size(group_name)
    gathered = _all_gather(torch.cat([tensor.reshape(-1) for tensor in tensors]), group_name).view(ranks, -1)
    parts = gathered.split([tensor.numel() for tensor in tensors], dim=1)
    return tuple(
        part.reshape(ranks * tensor.shape[0], *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True)
    )


def reduce_scatter_rows(tensors: Sequence[torch.Tensor], group_name: str) -> tuple[torch.Tensor, ...]:
    """Partial sums `[rows, ...]` of one dtype in, this rank's rows of their sums out, as `all_reduce_coalesced`."""
    ranks = group_size(group_name)
    own = _reduce_scatter(torch.cat([tensor.reshape(ranks, -1) for tensor in tensors], dim=1).view(-1), group_name)
    parts = own.split([tensor.numel() // ranks for tensor in tensors])
    return tuple(
        part.view(tensor.shape[0] // ranks, *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True)
    )


def _identities(tensors: Sequence[torch.Tensor], group_name: str) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.view_as(tensor) for tensor in tensors)


CoalescedMapping = Callable[[Sequence[torch.Tensor], str], Sequence[torch.Tensor]]


def _differentiable_coalesced(
    name: str, forward: CoalescedMapping, backward: CoalescedMapping, doc: str
) -> CoalescedMapping:
    """Do as `_differentiable`, for several tensors in one message; gathered ones are of one dtype."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, group_name: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ctx.group_name = group_name
            return tuple(forward(tensors, group_name))

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return None, *backward(grads, ctx.group_name)

    def collective(tensors: Sequence[torch.Tensor], group_name: str) -> Sequence[torch.Tensor]:
        if group_size(group_name) == 1:
            return tensors
        if has_torch_function(tensors):
            return handle_torch_function(collective, tensors, tensors, group_name)
        return Collective.apply(group_name, *tensors)

    collective.__name__ = collective.__qualname__ = Collective.__qualname__ = name
    collective.__doc__ = doc
    return collective


gather_rows_coalesced = _differentiable_coalesced(
    "gather_rows_coalesced",
    _all_gather_rows,
    reduce_scatter_rows,
    "Row-sharded weights `[rows/tp, ...]` to `[rows, ...]`; their gradients are partial and reduce-scattered.",
)


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group_name: str, num_shards: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group_name = group_name
        return tuple(whole.view_as(whole) for whole in tensors[num_shards:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *reduce_scatter_rows(grads, ctx.group_name), *[None] * len(grads)


def substitute_gathered_rows(
    shards: Sequence[torch.Tensor], group_name: str, wholes: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Take the place of `gather_rows_coalesced` where the gathered weights are at hand.

    Nothing is sent on the way there; the gradients are reduce-scattered as usual.
    """
    if group_size(group_name) == 1:
        return shards
    if has_torch_function((*shards, *wholes)):
        return handle_torch_function(substitute_gathered_rows, (*shards, *wholes), shards, group_name, wholes)
    return _GatheredRows.apply(group_name, len(shards), *shards, *wholes)


copy_to_group_coalesced = _differentiable_coalesced(
    "copy_to_group_coalesced",
    _identities,
    all_reduce_coalesced,
    "Replicated weights in, the same out; their gradients are partial and all-reduced.",
)
reduce_from_group_coalesced = _differentiable_coalesced(
    "reduce_from_group_coalesced", all_reduce_coalesced, _identities, "Partial sums in, their sums on every rank out."
)

# What these return, or their gradients, is another part of a tensor on every rank, and so is the traced graph.
DEPEND_ON_RANK = frozenset({split_features, gather_features})

# What both products take is made of a layer's input by these; where tokens are gathered, each product gathers its own.
ENTER: dict[str, Mapping] = {"copy": copy_to_group, "split_features": split_features}
REDUCE: dict[str, Mapping] = {
    "all_reduce": reduce_from_group,
    "reduce_scatter_sequence": reduce_scatter_sequence,
}
