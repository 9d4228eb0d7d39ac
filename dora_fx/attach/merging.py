"""Merge adapters into the weights they adapt, and take them out again.

    W' = g * (W0 + s B A)        g = 1 + delta = m / n, and 1 for a row of zeros

The layer that is left is the plain base layer, so a merged model is a plain Megatron model: its forward pass,
graphs and state dicts have no trace of DoRA. Merging is local to a rank, because W' is sharded as W0 is; only A,
B and the norms' partial sums travel, one layer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from dora_fx.attach.kept_adapter import KeptAdapter, keep, kept_adapter_maybe, mark_was_quantised, merged_layers
from dora_fx.attach.matching import adapted_layers
from dora_fx.attach.merge_checks import check_mergeable, check_restorable
from dora_fx.attach.merged_weights import merged_weight, served_dtype
from dora_fx.function import QuantisedWeight
from dora_fx.megatron import ModelT, chunks_of, rebuild_gradient_buffers, replace_modules
from dora_fx.modules import DoRALinear, keep_bank, weights_of

logger = logging.getLogger(__name__)


@torch.inference_mode(False)
def merge(model: ModelT, *, keep_adapter: bool = False) -> ModelT:
    """Put plain layers with the merged weight `[out, in]` in place of all adapted ones; return the model given.

    Every tensor-parallel rank calls it, and each merges its own shard. Products and norms are taken in float32 (in
    float64 for a float64 model) and rounded to the base weight's dtype once, so the merged model computes what the
    adapted one does up to rounding, without dropout. Biases are left as they are, and the weights stay frozen.
    A quantised layer's place is taken by a dense one in the dtype of the activations: quantised again it would lose
    much of what was trained. A layer of several experts takes memory for the merged weights of all of them. Everything
    is checked before anything is changed.

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
    check_mergeable(chunks, sites, keep_adapter=keep_adapter)
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
    check_restorable(chunks)
    layers = merged_layers(chunks)
    _replace(chunks, _restore(named.module for named, _ in layers))
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


def _merge_site(site: DoRALinear, dtype: torch.dtype, *, keep_adapter: bool) -> nn.Module:
    """Merge one layer and return the plain one: the base with another weight, or a new one if it is quantised."""
    linear, kept = site.to_wrap, None
    if isinstance(site.base_weight, QuantisedWeight):
        linear = _dense_layer(site, dtype)
        kept = KeptAdapter(site, None) if keep_adapter else None
    else:
        weights = weights_of(linear)
        if keep_adapter:
            kept = KeptAdapter(site, tuple(each.detach().to("cpu", copy=True) for each in weights))
        # All of a layer's before one is written: a layer of several experts is merged whole, or as it was.
        values = [merged_weight(site, index).to(each.dtype) for index, each in enumerate(weights)]
        _write_weights(weights, values)
    before = kept_adapter_maybe(linear)
    if kept is None and before is not None:
        kept = replace(before, merged_again=True)
    if kept is not None:
        keep(linear, kept)
    return linear


def _dense_layer(site: DoRALinear, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen layer with the merged weight of a quantised one, in its mode and with its bias."""
    weight, bias = merged_weight(site).to(dtype), site.bias
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    mark_was_quantised(dense)
    return dense.train(site.training)


def _restore(linears: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Write the weights of before into merged layers; return the adapted layer of each."""
    sites: dict[nn.Module, nn.Module] = {}
    for linear in linears:
        kept, weights = kept_adapter_maybe(linear), weights_of(linear)
        assert kept is not None
        keep(linear, None)
        weight = weights[0]
        if kept.weights is None:
            # Its weight cannot be cast, so neither are its adapter's factors. A weight of torchao's that compiled code
            # knows cannot be moved either.
            if kept.site.base_weight.device != weight.device:
                kept.site.to(device=weight.device)
        else:
            _write_weights(weights, kept.weights)
            # The wrapper's own cast keeps the magnitude in float32 and measures the base weight again.
            kept.site.to(device=weight.device, dtype=weight.dtype)
        kept.site.train(linear.training)
        sites[linear] = kept.site
    return sites


def _replace(chunks: Iterable[nn.Module], replacements: Mapping[nn.Module, nn.Module]) -> None:
    for chunk in chunks:
        replace_modules(chunk, replacements)


def _write_weights(weights: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        # A weight that a user made in inference mode can be written in inference mode alone.
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.copy_(value)
