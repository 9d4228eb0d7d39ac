"""Merge adapters into the weights they adapt, and take them out again.

    W' = g * (W0 + s B A)        g = 1 + delta = m / n, and 1 for a row of zeros

The layer that is left is the plain base layer, so a merged model is a plain Megatron model: its forward pass,
graphs and state dicts have no trace of DoRA. Merging is local to a rank, because W' is sharded as W0 is; only A,
B and the norms' partial sums travel, one layer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import nn

from dora_fx.attach.matching import adapted_layers
from dora_fx.function.collectives import gather_rows_coalesced
from dora_fx.function.row_scale import magnitude_delta
from dora_fx.function.weight_norm import norm_dtype
from dora_fx.megatron.data_parallel import rebuild_gradient_buffers
from dora_fx.megatron.wrappers import ModelT, check_unsharded, chunks_of, replace_modules, walk
from dora_fx.modules.dora_linear import DoRALinear
from dora_fx.modules.finite import adapter_not_finite_maybe
from dora_fx.ranks.agreement import problem_of_any_rank_maybe
from dora_fx.ranks.groups import resolve_group

logger = logging.getLogger(__name__)

NOTHING_ADAPTED = "found no adapted layer, expected a model that DoRA was called on"
_KEPT = "_dora_fx_kept"


@dataclass(frozen=True)
class KeptAdapter:
    """The data that `unmerge` needs, kept on the merged layer; not a module, so that the model does not contain it.

    Attributes:
        site: the adapted layer that the merged one stands in for.
        weight: a copy of W0, or of this rank's shard, in host memory.
    """

    site: DoRALinear
    weight: torch.Tensor


def merge(model: ModelT, *, keep_adapter: bool = False) -> ModelT:
    """Put plain layers with the merged weight `[out, in]` in place of all adapted ones; return the model given.

    Every tensor-parallel rank calls it, and each merges its own shard. Products and norms are taken in float32 (in
    float64 for a float64 model) and rounded to the base weight's dtype once, so the merged model computes what the
    adapted one does up to rounding, without dropout. Biases are left as they are, and the weights stay frozen.
    Everything is checked before anything is changed.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped. Megatron's DistributedDataParallel
            gets new gradient buffers unless the adapters are kept.
        keep_adapter: let `unmerge` undo it. Costs a copy of every adapted weight in host memory. The adapters'
            parameters stay the same objects, but are not in the model, nor in its state dict, while it is merged.

    Raises:
        ValueError: on every rank, naming the layer: nothing is adapted; a layer's weight is tied to an embedding
            or to another layer, which merging would change too; an adapter is disabled, or has NaN or inf.
    """
    chunks = chunks_of(model)
    sites = [(named.whole_path, named.module) for _, named in adapted_layers(chunks)]
    _check_mergeable(chunks, sites)
    for _, site in sites:
        kept = site.base_weight.detach().to("cpu", copy=True) if keep_adapter else None
        _write_weight(site.to_wrap.weight, merged_weight(site))
        if kept is not None:
            setattr(site.to_wrap, _KEPT, KeptAdapter(site, kept))
    for chunk in chunks:
        replace_modules(chunk, {site: site.to_wrap for _, site in sites})
    if not keep_adapter:
        rebuild_gradient_buffers(chunks)
    logger.info("merged %d layers", len(sites))
    return model


def unmerge(model: ModelT) -> ModelT:
    """Undo `merge(model, keep_adapter=True)`: bitwise the base weights of before, and the same adapter modules.

    A cast or a move of the model in between is carried over to the adapters. Every rank calls it.

    Raises:
        ValueError: no layer of the model was merged with its adapter kept, or one was adapted again since.
    """
    chunks = chunks_of(model)
    merged = [named for chunk in chunks for named in walk(chunk) if hasattr(named.module, _KEPT)]
    if not merged:
        raise ValueError("found no merged layer, expected a model after merge(model, keep_adapter=True)")
    for named in merged:
        if named.path.endswith(".to_wrap"):
            path = named.whole_path.removesuffix(".to_wrap")
            raise ValueError(f"{path}: adapted again since it was merged; merge that first")
    sites: dict[nn.Module, nn.Module] = {}
    for linear in (named.module for named in merged):
        kept = getattr(linear, _KEPT)
        delattr(linear, _KEPT)
        _write_weight(linear.weight, kept.weight)
        # The wrapper's own cast keeps the magnitude in float32 and measures the base weight again.
        kept.site.to(device=linear.weight.device, dtype=linear.weight.dtype)
        kept.site.train(linear.training)
        sites[linear] = kept.site
    for chunk in chunks:
        replace_modules(chunk, sites)
    logger.info("unmerged %d layers", len(merged))
    return model


@contextmanager
def merged(model: ModelT) -> Iterator[ModelT]:
    """Within the context the model is merged, for evaluation and generation at the base's price.

    Afterwards, also after an exception, base weights and adapters are bitwise what they were. See `merge`, which says
    what it costs, what is refused, and that every rank calls it.
    """
    merge(model, keep_adapter=True)
    try:
        yield model
    finally:
        unmerge(model)


@torch.no_grad()
def merged_weight(site: DoRALinear) -> torch.Tensor:
    """g * (W0 + s B A), `[out, in]` or this rank's shard; float32, or float64 in a float64 model.

    Every rank of the layer's tensor-parallel group calls it.
    """
    adapter, layout = site.adapter, site.adapter.layout
    lora_a, lora_b = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
    if adapter.tp_group:
        if layout.gathers_lora_a:
            [lora_a] = gather_rows_coalesced([lora_a], adapter.tp_group)
        if layout.gathers_lora_b:
            [lora_b] = gather_rows_coalesced([lora_b], adapter.tp_group)
    delta = magnitude_delta(adapter.weight_magnitude, site._get_weight_norm())
    return merge_tensors(site.base_weight, lora_a, lora_b, delta, adapter.scaling)


@torch.no_grad()
def merge_tensors(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, delta: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(1 + delta) * (W0 + scaling * B A) in float32 at least.

    Args:
        weight: W0 `[out, in]`.
        lora_a, lora_b: A `[dim, in]` and B `[out, dim]`.
        delta: `[out]`, from `row_scale.magnitude_delta`.
    """
    wide = norm_dtype(weight.dtype)
    merged = torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scaling)
    return merged.mul_(1.0 + delta.to(wide)[:, None])


def _check_mergeable(chunks: Sequence[nn.Module], sites: Sequence[tuple[str, DoRALinear]]) -> None:
    """Raise on every rank of the model, all of its pipeline stages, if a site of any of them cannot be merged."""
    problem = merge_problem_maybe(chunks, sites)
    groups = [resolve_group(tp_group) for tp_group in sorted({site.adapter.tp_group for _, site in sites} - {""})]
    if parallel_state.model_parallel_is_initialized():
        groups.append(parallel_state.get_pipeline_model_parallel_group())
    # Every rank takes part in every exchange before it raises: those of another stage hear of it in the last one.
    for group in groups:
        problem = problem_of_any_rank_maybe(problem, group)
    if problem is None and not sites:
        problem = _nothing_adapted(chunks)
    if problem is not None:
        raise ValueError(problem)


def _nothing_adapted(chunks: Sequence[nn.Module]) -> str:
    is_merged = any(hasattr(named.module, _KEPT) for chunk in chunks for named in walk(chunk))
    return "found a model that is merged already; unmerge it first" if is_merged else NOTHING_ADAPTED


def merge_problem_maybe(chunks: Sequence[nn.Module], sites: Sequence[tuple[str, DoRALinear]]) -> str | None:
    """The first reason why a site of this rank cannot be merged; `sites` by their paths in the whole model."""
    users = _users_of_weights(chunks)
    return next((problem for path, site in sites if (problem := _problem_maybe(path, site, users)) is not None), None)


def _problem_maybe(path: str, site: DoRALinear, users: dict[int, list[str]]) -> str | None:
    try:
        check_unsharded(path, site)
    except ValueError as error:
        return str(error)
    if site.weight is None:
        return (
            f"{path}: the layer multiplies by the embedding's weight, and merging would change the embedding; "
            "untie them, or exclude this layer from DoRA"
        )
    others = [user for user in users[id(site.weight)] if user != f"{path}.to_wrap"]
    if others or getattr(site.weight, "shared_embedding", False):
        shared_with = ", ".join(others) or "the embedding of another pipeline stage"
        return f"{path}: the layer shares its weight with {shared_with}, which merging would change too; untie them"
    if not site._adapter_enabled:
        return f"{path}: the adapter is disabled, so merging would change the function; enable it first"
    if site.weight.is_meta:
        return f"{path}: the base weight is on the meta device; load it before merging"
    return adapter_not_finite_maybe([(path, site)])


def _users_of_weights(chunks: Sequence[nn.Module]) -> dict[int, list[str]]:
    """Paths of the modules that own each parameter, by the parameter's id."""
    users: dict[int, list[str]] = {}
    for chunk in chunks:
        for _, path, module in walk(chunk):
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), []).append(path)
    return users


@torch.no_grad()
def _write_weight(weight: torch.Tensor, value: torch.Tensor) -> None:
    weight.copy_(value)
