"""Named faults planted in the library's own code, one at a time, to see whether the harness notices."""

from __future__ import annotations

import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from dora_fx.attach import plan
from dora_fx.cache import freshness
from dora_fx.function import collectives, dropout, formula, row_scale, site_parameters, weight_norm
from dora_fx.modules import partial_gradients
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter as Adapter
from dora_fx.modules.adapter_settings import low_rank_scaling
from dora_fx.modules.kinds import LinearSpec, megatron_linear


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` in the source of a function or property getter."""

    name: str
    function: Callable[..., Any]
    old: str
    new: str


WRONG_GROUP = Mutation(
    "data-parallel group in place of the tensor-parallel one",
    LinearSpec.tp_group_name.fget,
    "self.tp_group.group_name if",
    "_data_parallel_group().group_name if",
)
BITS_ARE_NOT_COMPARED = Mutation(
    "stale norm",
    freshness.are_up_to_date,
    "answers[index] = known.sources.has_same_bits(entry.sources)",
    "answers[index] = True",
)
MUTATIONS = [
    WRONG_GROUP,
    Mutation("bias scaled", row_scale._ScaleRows.forward, "output if bias is None else output - bias", "output"),
    Mutation("magnitude's gradient of the bias", row_scale._ScaleRows.backward, "else output - bias", "else output"),
    Mutation("magnitude's gradient not scaled", row_scale._ScaleRows.backward, "shape) * grad_scale", "shape)"),
    Mutation("output gradient not scaled", row_scale._ScaleRows.backward, "grads[0] * grad_gain", "grads[0]"),
    Mutation(
        "magnitude's gradient under dropout", row_scale._WithGradient.backward, "(grad_gain * grad_scale)", "grad_scale"
    ),
    Mutation(
        "magnitude's gradient left partial",
        site_parameters.StoredParameters.magnitude_grad_is_partial.fget,
        "self.layout.magnitude_grad_is_partial(dropout=self.dropout is not None)",
        "False",
    ),
    Mutation(
        "magnitude's gradient left partial under dropout",
        site_parameters.StoredParameters.magnitude_grad_is_partial.fget,
        "dropout=self.dropout is not None",
        "dropout=False",
    ),
    Mutation(
        "gain applied before the reduce, magnitude's gradient left partial",
        formula._scaled,
        "output = _join(_base_product(_all_tokens(x, stored), stored, bias), low_rank, stored, bias)",
        "delta = trained_delta(operands.magnitude, operands.scale)\n        "
        "product = _base_product(_all_tokens(x, stored), stored, bias)\n        "
        "return _join(product * (delta + 1.0), low_rank * (delta + 1.0), stored, bias)",
    ),
    Mutation("no dropout correction", formula._scaled_under_dropout, "dropped_product * delta +", ""),
    Mutation(
        "two dropout masks",
        formula._scaled_under_dropout,
        "change = dropped_product",
        "other = draw_dropout_key(x, stored.tp_group)\n"
        "    other = _drop(x, other, stored, operands, own=stored.layout.shards_input_tokens)\n"
        "    change = F.linear(_all_tokens(other, stored), stored.weight)",
    ),
    Mutation("input gradient not reduced", formula.adapted_linear, "layout.enter in ENTER", 'layout.enter == "x"'),
    Mutation("low-rank product not scaled", formula._scaled_under_dropout, "(delta + 1.0)", "1.0"),
    Mutation("gain without minus norm", row_scale.magnitude_delta, "(magnitude - norm)", "magnitude"),
    Mutation(
        "low-rank product not reduced",
        formula._scaled,
        "base_output + _reduce(low_rank, stored)",
        "base_output + low_rank",
    ),
    Mutation(
        "low-rank product joined after the reduce",
        formula._join,
        "_reduce(product + addend, stored)",
        "_reduce(product, stored) + addend",
    ),
    Mutation(
        "base collective run twice",
        formula._join,
        "_reduce(product + addend, stored)",
        "_reduce(_reduce(product + addend, stored), stored)",
    ),
    Mutation(
        "gradient of A x from the rank's own output rows alone",
        formula._low_rank_product,
        "_all_tokens(hidden, stored)",
        "_gathered_tokens_only(hidden, stored.tp_group) if stored.layout.gathers_tokens else hidden",
    ),
    Mutation("alpha and dim swapped", low_rank_scaling, "else alpha / dim", "else dim / alpha"),
    Mutation("norm over the wrong axis", weight_norm.base_norm_squared, "detach(), dim=1", "detach(), dim=0"),
    Mutation("norm over both axes", weight_norm.norm_of_terms, "gram) * wide_b).sum(1)", "gram) * wide_b).sum()"),
    Mutation("norm in bfloat16", weight_norm.norm_of_terms, ".sqrt()", ".sqrt().bfloat16().to(dtype)"),
    Mutation("norm's terms not reduced", site_parameters._row_norms, "site.layout.shards_input_features", "False"),
    Mutation("norm's terms swapped", site_parameters._row_norms, "whole[::2], whole[1::2]", "whole[1::2], whole[::2]"),
    Mutation("norm's scaling not squared", weight_norm.norm_of_terms, "scaling.square()", "scaling"),
    Mutation(
        "stale norm",
        site_parameters._row_norms,
        "of_terms(linear_terms, gram, b, scaling=site.scaling, dtype=norm_dtype(site.dtype))",
        "_stale.setdefault(site.weight.data_ptr(),"
        " of_terms(linear_terms, gram, b, scaling=site.scaling, dtype=norm_dtype(site.dtype)))",
    ),
    Mutation(
        "norms summed instead of squares", weight_norm.base_norm_squared, "(weight.dtype)).square()", "(weight.dtype))"
    ),
    Mutation(
        "base norm left out", weight_norm.norm_terms, "addcmul(base_norm_sq", "addcmul(torch.zeros_like(base_norm_sq)"
    ),
    Mutation(
        "weight gradients not reduced",
        collectives.reduce_scatter_rows,
        "_reduce_scatter(torch.cat([tensor.reshape(ranks, -1) for tensor in tensors], dim=1).view(-1), group_name)",
        "torch.cat([tensor.reshape(ranks, -1) for tensor in tensors], dim=1)[group_rank(group_name)]",
    ),
    Mutation(
        "gradient of A not reduced",
        site_parameters._whole_factors,
        "_together(substitute_gathered_rows, requests, gathered)",
        "_together(_gathered_rows_only, requests[: len(sites)], gathered[: len(sites)])"
        " + _together(substitute_gathered_rows, requests[len(sites) :], gathered[len(sites) :])",
    ),
    Mutation(
        "gradient of B not reduced",
        site_parameters._whole_factors,
        "_together(substitute_gathered_rows, requests, gathered)",
        "_together(substitute_gathered_rows, requests[: len(sites)], gathered[: len(sites)])"
        " + _together(_gathered_rows_only, requests[len(sites) :], gathered[len(sites) :])",
    ),
    Mutation("weight gradients reduced twice", collectives.reduce_scatter_rows, "(ranks, -1)", "(ranks, -1) * 2"),
    Mutation(
        "sum of the last micro-batch alone",
        partial_gradients.GradientAccumulator._collect,
        "self.total.add_(grad)",
        "self.total.copy_(grad)",
    ),
    Mutation(
        "sums not handed over",
        partial_gradients.GradientAccumulator.add_completed,
        "main_grad.add_(self._rows_first(gradient))",
        "main_grad.add_(0)",
    ),
    Mutation("factors gathered backwards", collectives._all_gather_rows, "part.reshape(", "part.flip(0).reshape("),
    Mutation("group of one rank", LinearSpec.tp_group_name.fget, "self.tp_size > 1", "self.tp_size > 2"),
    Mutation("mask shared between feature shards", dropout.keep_mask, "features + key[2] * x.shape[-1]", "features"),
    Mutation("mask shared between token shards", dropout.keep_mask, "tokens + key[2] * tokens.shape[0]", "tokens"),
    Mutation("mask differs between replicas", dropout.keep_mask, "tokens ^ key[0]", "tokens ^ key[0] ^ key[2]"),
    Mutation("dropout without rescaling", dropout.dropout, "x * rescale.view(())", "x"),
    Mutation("shards not marked", Adapter._mark_sharded_parameters, "if placement.shard_dim is not None", "if False"),
    Mutation(
        "magnitude marked as a shard", Adapter._mark_sharded_parameters, "if placement.shard_dim is not None", "if True"
    ),
    Mutation("A drawn per rank", plan.seed_for, "(seed +", "(seed + _rank() +"),
    Mutation("gated rows sharded as one block", megatron_linear.row_blocks, "2 if linear", "1 if linear"),
]


# Faults of sequence-parallel column layers, whose ranks have a part of A's gradient each: their own tokens'.
OF_OWN_TOKENS = [
    "gradient of A x from the rank's own output rows alone",
    "gradient of A not reduced",
    "mask shared between token shards",
]


class _GatheredTokensOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group_name: str) -> torch.Tensor:
        ctx.group_name = group_name
        return collectives.gather_sequence(x, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks, rank = collectives.group_size(ctx.group_name), collectives.group_rank(ctx.group_name)
        return grads[0].chunk(ranks)[rank], None


def _gathered_tokens_only(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """As `collectives.gather_sequence`, but the gradient is not reduced."""
    if has_torch_function_unary(x):
        return handle_torch_function(_gathered_tokens_only, (x,), x, group_name)
    return _GatheredTokensOnly.apply(x, group_name)


class _GatheredRowsOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group_name: str, num_shards: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group_name = group_name
        return tuple(whole.view_as(whole) for whole in tensors[num_shards:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ranks, rank = collectives.group_size(ctx.group_name), collectives.group_rank(ctx.group_name)
        return None, None, *(grad.chunk(ranks)[rank] for grad in grads), *[None] * len(grads)


def _gathered_rows_only(
    shards: Sequence[torch.Tensor], group_name: str, wholes: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """As `collectives.substitute_gathered_rows`, but no gradient is reduced."""
    if has_torch_function((*shards, *wholes)):
        return handle_torch_function(_gathered_rows_only, (*shards, *wholes), shards, group_name, wholes)
    return _GatheredRowsOnly.apply(group_name, len(shards), *shards, *wholes)


def _planted_names() -> dict[str, Any]:
    """What the mutated sources may use beside their own module's names; fresh, as one of them holds state."""
    return {
        "_rank": dist.get_rank,
        "_stale": {},
        "_data_parallel_group": parallel_state.get_data_parallel_group,
        "_gathered_rows_only": _gathered_rows_only,
        "_gathered_tokens_only": _gathered_tokens_only,
    }


def source_of(mutation: Mutation) -> str:
    """The source of the function that a mutation changes, without decorators and indentation."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(mutation.function)))
    return source[source.index("def ") :]


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """Within the context the mutated source is what runs, through every reference to the function."""
    target = inspect.unwrap(mutation.function)
    assert isinstance(target, types.FunctionType)
    source, names = source_of(mutation), _planted_names()
    assert source.count(mutation.old) == 1, f"{mutation.name}: {mutation.old!r} is not once in {target.__qualname__}"
    namespace = dict(target.__globals__)
    exec(compile(source.replace(mutation.old, mutation.new), target.__code__.co_filename, "exec"), namespace)
    original = target.__code__
    target.__globals__.update(names)
    target.__code__ = namespace[target.__name__].__code__
    try:
        yield
    finally:
        target.__code__ = original
        for name in names:
            # Another fault in the same module may have taken it out already.
            target.__globals__.pop(name, None)
