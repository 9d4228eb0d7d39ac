"""Merge adapters into the weights they adapt, and take them out again.

    W' = g * (W0 + s B A)        g = 1 + delta = m / n, and 1 for a row of zeros

The layer that is left is the plain base layer, so a merged model is a plain Megatron model: its forward pass,
graphs and state dicts have no trace of DoRA. Merging is local to a rank, because W' is sharded as W0 is; only A,
B and the norms' partial sums travel, one layer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from dora_fx.attach.matching import adapted_layers
from dora_fx.attach.shared_weights import sharing_problem_maybe
from dora_fx.function import QuantisedWeight, gather_rows_coalesced, magnitude_delta, norm_dtype, whole_of
from dora_fx.megatron import (
    ModelT,
    NamedModule,
    check_unsharded,
    chunks_of,
    rebuild_gradient_buffers,
    replace_modules,
    walk,
)
from dora_fx.modules import (
    DoRALinear,
    GroupedDoRALinear,
    adapter_not_finite_maybe,
    bank_of,
    inactive_adapters,
    keep_bank,
    kind_of_maybe,
    quantised_weight_maybe,
)
from dora_fx.ranks import of_all_parts, problem_of_any_rank_maybe, resolve_group

logger = logging.getLogger(__name__)

NOTHING_ADAPTED = "found no adapted layer, expected a model that DoRA was called on"
_KEPT = "_dora_fx_kept"
# An attribute of a dense layer in the place of a quantised one.
_WAS_QUANTISED = "_dora_fx_was_quantised"
_KEPT_TWICE = (
    "{}: found an adapter over a layer whose merge was kept to be undone, expected one of them to be kept: "
    "merge it without keep_adapter, after which neither can be undone"
)


@dataclass(frozen=True)
class KeptAdapter:
    """The data that `unmerge` needs, an attribute of the merged layer. No module, so the model does not contain it.

    Attributes:
        site: the adapted layer that the merged one stands in for.
        weight: a copy of W0, or of this rank's shard, in host memory; None where the merged layer is another one than
            the base, which has its weight still.
        merged_again: another adapter was merged into the layer since, which unmerging would lose.
    """

    site: DoRALinear
    weight: torch.Tensor | None
    merged_again: bool = False


@torch.inference_mode(False)
def merge(model: ModelT, *, keep_adapter: bool = False) -> ModelT:
    """Put plain layers with the merged weight `[out, in]` in place of all adapted ones; return the model given.

    Every tensor-parallel rank calls it, and each merges its own shard. Products and norms are taken in float32 (in
    float64 for a float64 model) and rounded to the base weight's dtype once, so the merged model computes what the
    adapted one does up to rounding, without dropout. Biases are left as they are, and the weights stay frozen.
    A quantised layer's place is taken by a dense one in the dtype of the activations: quantised again it would lose
    much of what was trained. Everything is checked before anything is changed.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped. Megatron's DistributedDataParallel
            gets new gradient buffers unless the adapters are kept.
        keep_adapter: let `unmerge` undo it. Costs a copy of every adapted weight in host memory. The adapters'
            parameters stay the same objects, but are not in the model, nor in its state dict, while it is merged.

    Raises:
        ValueError: on every rank, naming the layer: no stage has an adapter; a layer's weight is tied to an embedding
            or to another layer, or is in the memory of another model's, which merging would change too; an adapter
            is disabled, or has NaN or inf; a layer's adapter is to be kept while that of an earlier merge is; the model
            has other adapters than the active one, and this one is not to be kept.
    """
    chunks = chunks_of(model)
    sites = [(named.whole_path, named.module) for _, named in adapted_layers(chunks)]
    _check_mergeable(chunks, sites, keep_adapter=keep_adapter)
    plain_layers: dict[nn.Module, nn.Module] = {}
    try:
        for chunk, (_, _, site) in adapted_layers(chunks):
            dtype = served_dtype(chunk, site)
            plain_layers[site] = _merge_site(site, dtype, keep_adapter=keep_adapter)
    except BaseException:
        # Out of memory, say. An adapter beside a weight that it is merged into would be applied twice. So the layers
        # that are merged already are restored, or, where nothing is kept to restore them, lose their adapters.
        if keep_adapter:
            _restore(plain_layers.values())
        else:
            # A dense layer in the place of a quantised one wrote nothing into that.
            _replace(chunks, {site: layer for site, layer in plain_layers.items() if layer is site.to_wrap})
        raise
    _replace(chunks, plain_layers)
    if not keep_adapter:
        for chunk in chunks:
            keep_bank(chunk, None)
        rebuild_gradient_buffers(chunks)
    logger.info("merged %d layers", len(sites))
    _say_dense(plain_layers)
    return model


@torch.inference_mode(False)
def unmerge(model: ModelT) -> ModelT:
    """Undo `merge(model, keep_adapter=True)`: bitwise the base weights of before, and the same adapter modules.

    A cast or a move of the model in between is carried over to the adapters. Every rank calls it. Everything is checked
    before anything is changed, so the copies of the base weights stay where it raises.

    Raises:
        ValueError: on every rank, naming the layer: no layer of the model was merged with its adapter kept; one was
            adapted again since, also where that adapter was merged; its weight cannot take the values of before, or is
            in the memory of another module's, which would change too.
    """
    chunks = chunks_of(model)
    layers = [named for chunk in chunks for named in walk(chunk) if hasattr(named.module, _KEPT)]
    problem = _unmerge_problem_maybe(chunks, layers)
    _raise_together(problem, {getattr(named.module, _KEPT).site.adapter.tp_group for named in layers})
    if not _on_any_stage(bool(layers)):
        raise ValueError("found no merged layer, expected a model after merge(model, keep_adapter=True)")
    _replace(chunks, _restore(named.module for named in layers))
    logger.info("unmerged %d layers", len(layers))
    return model


@contextmanager
def merged(model: ModelT) -> Iterator[ModelT]:
    """Within the context the model is merged, for evaluation and generation at the base's price.

    Afterwards, also after an exception, base weights and adapters are bitwise what they were. See `merge`, which says
    what it costs, what is refused, and that every rank calls it. It does not nest.
    """
    merge(model, keep_adapter=True)
    try:
        yield model
    finally:
        unmerge(model)


def _say_dense(plain_layers: Mapping[nn.Module, nn.Module]) -> None:
    dense = [layer for site, layer in plain_layers.items() if layer is not site.to_wrap]
    if dense:
        dtypes = " and ".join(sorted({str(layer.weight.dtype).removeprefix("torch.") for layer in dense}))
        logger.info("%d layers that were quantised are dense while they are merged, in %s", len(dense), dtypes)


def served_dtype(chunk: nn.Module, layer: nn.Module) -> torch.dtype:
    """Return the dtype of a layer's merged weight: its own, and that of activations where it is quantised.

    Activations have the dtype of a model's embeddings and norms; a quantised layer takes them in any.

    Args:
        chunk: that the layer is in.
        layer: a `DoRALinear`, or a quantised layer that is not adapted.
    """
    weight = layer.base_weight if isinstance(layer, DoRALinear) else quantised_weight_maybe(layer)
    assert weight is not None
    if not isinstance(weight, QuantisedWeight):
        return weight.dtype
    others = (named.module for named in walk(chunk, DoRALinear) if kind_of_maybe(named.module) is None)
    parameters = (
        parameter
        for module in others
        if not isinstance(module, DoRALinear)
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point()
    )
    first = next(parameters, None)
    return weight.dtype if first is None else first.dtype


def _merge_site(site: DoRALinear, dtype: torch.dtype, *, keep_adapter: bool) -> nn.Module:
    """Merge one layer and return the plain one: the base with another weight, or a new one if it is quantised."""
    linear, weight = site.to_wrap, site.base_weight
    kept = None
    if isinstance(weight, QuantisedWeight):
        linear = _dense_layer(site, dtype)
        kept = KeptAdapter(site, None) if keep_adapter else None
    else:
        kept = KeptAdapter(site, weight.detach().to("cpu", copy=True)) if keep_adapter else None
        _write_weight(linear.weight, merged_weight(site))
    if kept is not None:
        setattr(linear, _KEPT, kept)
    elif hasattr(linear, _KEPT):
        setattr(linear, _KEPT, replace(getattr(linear, _KEPT), merged_again=True))
    return linear


def _dense_layer(site: DoRALinear, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen layer with the merged weight of a quantised one, in its mode and with its bias."""
    weight, bias = merged_weight(site).to(dtype), site.bias
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    setattr(dense, _WAS_QUANTISED, True)
    return dense.train(site.training)


def was_quantised(module: nn.Module) -> bool:
    """Return whether a plain layer stands in the place of a quantised one that was merged."""
    return hasattr(module, _WAS_QUANTISED)


def merged_layer_maybe(module: nn.Module) -> DoRALinear | None:
    """Return the adapted layer that a merged one stands in for, if it can be taken out again."""
    kept: KeptAdapter | None = getattr(module, _KEPT, None)
    return None if kept is None else kept.site


def is_merged(module: nn.Module) -> bool:
    """Return whether a layer has an adapter merged into it that `unmerge` would take out."""
    return hasattr(module, _KEPT)


def _restore(linears: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Write the weights of before into merged layers; return the adapted layer of each."""
    sites: dict[nn.Module, nn.Module] = {}
    for linear in linears:
        kept: KeptAdapter = getattr(linear, _KEPT)
        weight: Any = linear.weight
        delattr(linear, _KEPT)
        if kept.weight is None:
            # Its weight cannot be cast, so neither are its adapter's factors. A weight of torchao's that compiled code
            # knows cannot be moved either.
            if kept.site.base_weight.device != weight.device:
                kept.site.to(device=weight.device)
        else:
            _write_weight(weight, kept.weight)
            # The wrapper's own cast keeps the magnitude in float32 and measures the base weight again.
            kept.site.to(device=weight.device, dtype=weight.dtype)
        kept.site.train(linear.training)
        sites[linear] = kept.site
    return sites


def _replace(chunks: Iterable[nn.Module], replacements: Mapping[nn.Module, nn.Module]) -> None:
    for chunk in chunks:
        replace_modules(chunk, replacements)


@torch.no_grad()
def merged_weight(site: DoRALinear) -> torch.Tensor:
    """Return g * (W0 + s B A), `[out, in]` or this rank's shard; float32, or float64 in a float64 model.

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
    return merge_tensors(whole_of(site.base_weight), lora_a, lora_b, delta, adapter.scaling)


@torch.no_grad()
def merge_tensors(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, delta: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return (1 + delta) * (W0 + scaling * B A) in float32 at least.

    Args:
        weight: W0 `[out, in]`.
        lora_a, lora_b: A `[dim, in]` and B `[out, dim]`.
        delta: `[out]`, from `row_scale.magnitude_delta`.
    """
    wide = norm_dtype(weight.dtype)
    merged = torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scaling)
    return merged.mul_(1.0 + delta.to(wide)[:, None])


def _check_mergeable(
    chunks: Sequence[nn.Module], sites: Sequence[tuple[str, DoRALinear]], *, keep_adapter: bool
) -> None:
    """Raise on every rank of the model, all of its pipeline stages, if a site of any of them cannot be merged."""
    problem = merge_problem_maybe(chunks, sites)
    if problem is None and any(bank_of(chunk).is_mixed for chunk in chunks):
        problem = "found a mixed batch, expected the end of the context of dora_fx.mixed"
    if problem is None and not keep_adapter and (others := inactive_adapters(chunks)):
        problem = (
            f"found adapters {others} beside the active one, trained on weights that merging would change, expected "
            "none: call delete_adapter for each, merge with keep_adapter=True, or stream the weights with iter_merged"
        )
    if problem is None and keep_adapter:
        problem = next((_KEPT_TWICE.format(path) for path, site in sites if hasattr(site.to_wrap, _KEPT)), None)
    if problem is None:
        written = {path: site.to_wrap for path, site in sites if not isinstance(site.base_weight, QuantisedWeight)}
        problem = sharing_problem_maybe(chunks, written)
    _raise_together(problem, {site.adapter.tp_group for _, site in sites})
    if not _on_any_stage(bool(sites)):
        raise ValueError(_nothing_adapted(chunks))


def _raise_together(problem: str | None, tp_groups: Iterable[str]) -> None:
    """Raise ValueError on all ranks of the model if one of them found a problem; every rank calls it."""
    groups = [resolve_group(tp_group) for tp_group in sorted(set(tp_groups) - {""})]
    if parallel_state.model_parallel_is_initialized():
        experts = parallel_state.get_expert_model_parallel_group(check_initialized=False)
        if experts is not None and experts.size() > 1:
            # Other ranks hold other experts, and an expert's own group may have one rank where dense layers have more.
            groups += [parallel_state.get_tensor_model_parallel_group(), experts]
        groups.append(parallel_state.get_pipeline_model_parallel_group())
    # Every rank takes part in every exchange before it raises: ranks of another stage wait for it in the last one.
    for group in groups:
        problem = problem_of_any_rank_maybe(problem, group)
    if problem is not None:
        raise ValueError(problem)


def _on_any_stage(flag: bool) -> bool:
    """Return whether something holds on a pipeline stage; one without adapters has nothing to do, and is no error."""
    return any(of_all_parts(flag)) if parallel_state.model_parallel_is_initialized() else flag


def _nothing_adapted(chunks: Sequence[nn.Module]) -> str:
    layers = [named for chunk in chunks for named in walk(chunk) if hasattr(named.module, _KEPT)]
    path = next((named.whole_path for named in layers if not getattr(named.module, _KEPT).merged_again), None)
    return NOTHING_ADAPTED if path is None else f"{path}: found a layer that is merged already; unmerge it first"


def _unmerge_problem_maybe(chunks: Sequence[nn.Module], layers: Sequence[NamedModule]) -> str | None:
    """Return the first reason why a merged layer cannot become what it was."""
    for named in layers:
        kept: KeptAdapter = getattr(named.module, _KEPT)
        if named.path.endswith(".to_wrap") or kept.merged_again:
            path = named.whole_path.removesuffix(".to_wrap")
            what = "and that adapter was merged too" if kept.merged_again else "by an adapter that is there"
            return f"{path}: found it adapted again since it was merged, {what}; undoing the merge would lose that one"
        weight = named.module.weight
        if kept.weight is None:
            continue
        if weight is None or weight.is_meta or weight.shape != kept.weight.shape:
            found = "none" if weight is None else f"one of shape {tuple(weight.shape)} on {weight.device}"
            return (
                f"{named.whole_path}.weight: found {found}, expected one of shape {tuple(kept.weight.shape)} with "
                "memory, for the base weight of before the merge"
            )
    written = [named for named in layers if getattr(named.module, _KEPT).weight is not None]
    return sharing_problem_maybe(chunks, {named.whole_path: named.module for named in written})


def merge_problem_maybe(chunks: Sequence[nn.Module], sites: Sequence[tuple[str, DoRALinear]]) -> str | None:
    """Return the first reason why a site of this rank cannot be merged; `sites` by their paths in the whole model."""
    users = _users_of_weights(chunks)
    return next((problem for path, site in sites if (problem := _problem_maybe(path, site, users)) is not None), None)


def _problem_maybe(path: str, site: DoRALinear, users: dict[int, list[str]]) -> str | None:
    try:
        check_unsharded(path, site)
    except ValueError as error:
        return str(error)
    if isinstance(site, GroupedDoRALinear):
        return (
            f"{path}: found a layer that holds {len(site.expert_weights)} experts, expected one of a single matrix: "
            "load the adapters' checkpoint into the same model with SequentialMLP, and merge that"
        )
    weight = site.base_weight
    own = weight.tensors[0] if isinstance(weight, QuantisedWeight) else site.weight
    if own is None:
        return (
            f"{path}: the layer multiplies by the embedding's weight, and merging would change the embedding; "
            "untie them, or exclude this layer from DoRA"
        )
    others = [user for user in users[id(own)] if user != f"{path}.to_wrap"]
    if others or getattr(own, "shared_embedding", False):
        shared_with = ", ".join(others) or "the embedding of another pipeline stage"
        return f"{path}: the layer shares its weight with {shared_with}, which merging would change too; untie them"
    if not site._adapter_enabled:
        return f"{path}: the adapter is disabled, so merging would change the function; enable it first"
    if own.is_meta:
        return f"{path}: the base weight is on the meta device; load it before merging"
    return adapter_not_finite_maybe([(path, site)])


def _users_of_weights(chunks: Sequence[nn.Module]) -> dict[int, list[str]]:
    """Return the paths of the modules that own each parameter, by the parameter's id."""
    users: dict[int, list[str]] = {}
    for chunk in chunks:
        for _, path, module in walk(chunk):
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), []).append(path)
    return users


def _write_weight(weight: torch.Tensor, value: torch.Tensor) -> None:
    # A weight that a user made in inference mode can be written in inference mode alone.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.copy_(value)
