"""From the shards that DoRA sites store to the tensors that their products take, with few collectives.

The layout table says which tensor is gathered or reduced (`placement.py`). All sites that are completed together share
one collective of each kind per process group and dtype: a graph of many layers sends its low-rank factors in one
message, and not in two per layer.

A grouped site is a layer that holds those of several experts. Its tensors have a first dimension more, that of experts,
and collectives gather and scatter rows, so its factors go through them with the rows in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx

from dora_fx.function.base_weight import BaseWeight
from dora_fx.function.collectives import (
    REDUCE,
    copy_to_group_coalesced,
    gather_rows_coalesced,
    reduce_from_group_coalesced,
    substitute_gathered_rows,
)
from dora_fx.function.dropout import DropoutFactors
from dora_fx.function.gradient_leaves import lead_gradients
from dora_fx.function.grouped_norm import grouped_base_norm_squared, grouped_norm_of_terms, grouped_norm_terms
from dora_fx.function.placement import LAYOUTS, Layout
from dora_fx.function.row_scale import RowScale, row_scale
from dora_fx.function.weight_norm import base_norm_squared, norm_dtype, norm_of_terms, norm_terms


class StoredParameters(NamedTuple):
    """The parameters that one site stores on this rank, and their distribution.

    Attributes:
        weight, lora_a, lora_b, magnitude: shards, see `placement.LAYOUTS`.
        base_norm_sq: `[out]` or this rank's `[out/tp]`, from `weight_norm.base_norm_squared`: partial sums in a row
            layout. None to have it computed with the norm.
        scaling: alpha / dim, a tensor `[1]`.
        dropout_threshold: of this call, see `dropout.DropoutFactors`; None without dropout.
        dropout_rescale: as `dropout_threshold`.
        layout_name, tp_group: names of the layout and of the process group; "" for a layer that is not parallel.
        dtype: of the weight and the low-rank factors.
        lora_a_leaf, lora_b_leaf, magnitude_leaf: what takes the gradient of the whole tensor where it is a partial sum
            that somebody completes later (`modules/partial_gradients.py`). None where the backward pass completes it,
            and not used where nothing is cached.
        expert_weights: of a grouped site, W0 of each of its experts; `weight` is the first of them then. None for any
            other.
    """

    weight: BaseWeight
    base_norm_sq: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor
    scaling: torch.Tensor
    dropout_threshold: torch.Tensor | None
    dropout_rescale: torch.Tensor | None
    layout_name: str
    dtype: torch.dtype
    tp_group: str = ""
    lora_a_leaf: torch.Tensor | None = None
    lora_b_leaf: torch.Tensor | None = None
    magnitude_leaf: torch.Tensor | None = None
    expert_weights: tuple[torch.Tensor, ...] | None = None

    @property
    def is_grouped(self) -> bool:
        """Return whether the site is grouped."""
        return self.expert_weights is not None

    def of_expert(self, index: int) -> StoredParameters:
        """The parameters of one expert of a grouped site, as a site of its own has them, outside any call.

        Its base norm is computed with its norm.
        """
        assert self.expert_weights is not None
        return self._replace(
            weight=self.expert_weights[index],
            base_norm_sq=None,
            lora_a=self.lora_a[index],
            lora_b=self.lora_b[index],
            magnitude=self.magnitude[index],
            lora_a_leaf=None,
            lora_b_leaf=None,
            magnitude_leaf=None,
            expert_weights=None,
        )

    @property
    def layout(self) -> Layout:
        """The site's row in the layout table."""
        return LAYOUTS[self.layout_name]

    @property
    def reduces(self) -> bool:
        """Return whether the products are partial sums, which the layout's own collective adds up."""
        return bool(self.tp_group) and self.layout.leave in REDUCE

    @property
    def dropout(self) -> DropoutFactors | None:
        """The factors of this call's dropout, None without dropout."""
        if self.dropout_threshold is None or self.dropout_rescale is None:
            return None
        return DropoutFactors(self.dropout_threshold, self.dropout_rescale)

    @property
    def parameters_with_leaves(self) -> list[torch.Tensor]:
        """The parameters whose gradients go to a leaf, and not to them, in a call that reads what is cached."""
        pairs = [(self.lora_a, self.lora_a_leaf), (self.lora_b, self.lora_b_leaf)]
        if self.magnitude_grad_is_partial:
            pairs.append((self.magnitude, self.magnitude_leaf))
        return [parameter for parameter, leaf in pairs if leaf is not None]

    @property
    def magnitude_grad_is_partial(self) -> bool:
        """See `Layout`; of this call."""
        return self.layout.magnitude_grad_is_partial(dropout=self.dropout is not None)


class SiteOperands(NamedTuple):
    """What one site computes with on this rank, made of what it stores.

    Attributes:
        lora_a: `[dim, in]`, or this rank's `[dim, in/tp]` in a row layout.
        lora_b: `[out, dim]`, or this rank's `[out/tp, dim]` in a column layout.
        magnitude: m as stored; its gradient is completed on the way back.
        scale: of the output rows.

    Those of a grouped site have a first dimension of experts.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor
    scale: RowScale


class CachedParameters(NamedTuple):
    """The results of `complete_parameters` that are the same in all calls until a parameter changes.

    Attributes:
        delta, grad_gain, grad_scale: a `RowScale`.
        lora_a, lora_b: the gathered factor where the layout gathers it, None where the stored one serves.
    """

    delta: torch.Tensor
    grad_gain: torch.Tensor
    grad_scale: torch.Tensor
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None

    @property
    def scale(self) -> RowScale:
        """The scale of the output rows."""
        return RowScale(self.delta, self.grad_gain, self.grad_scale)


class _Request(NamedTuple):
    """A tensor of a site, whether its collective is needed for it, and in which dtype it travels."""

    tensor: torch.Tensor
    wanted: bool
    tp_group: str
    dtype: torch.dtype


def complete_parameters(
    sites: Sequence[StoredParameters], cached: Sequence[CachedParameters] | None = None
) -> list[SiteOperands]:
    """Complete the parameters of several sites: gather factors, compute norms, reduce what is partial.

    Args:
        sites: of one graph.
        cached: what an earlier call for the same parameters gave, one per site. Nothing is gathered and no norm is
            computed then; gradients take the same way as without it.
    """
    if cached is None:
        # Leaves are for gradients of what is cached.
        sites = [site._replace(lora_a_leaf=None, lora_b_leaf=None, magnitude_leaf=None) for site in sites]
    lora_a, lora_b = _whole_factors(sites, cached)
    if cached is None:
        norms = _row_norms(sites, lora_a, lora_b)
        scales = _row_scales(sites, norms)
    else:
        scales = [cache.scale for cache in cached]
    lora_a, lora_b, magnitudes = _with_complete_gradients(sites, lora_a, lora_b)
    return [SiteOperands(*parts) for parts in zip(lora_a, lora_b, magnitudes, scales, strict=True)]


def _row_scales(sites: Sequence[StoredParameters], norms: Sequence[torch.Tensor]) -> list[RowScale]:
    """The scales of several sites; those of one dtype are computed together, since each takes a dozen small operations.

    A graph has those of each site, which Inductor fuses with what follows.
    """
    if any(isinstance(norm, fx.Proxy) for norm in norms):
        return [row_scale(site.magnitude, norm, site.dtype) for site, norm in zip(sites, norms, strict=True)]
    scales: dict[int, RowScale] = {}
    together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, site in enumerate(sites):
        together.setdefault((site.dtype, site.magnitude.device), []).append(index)
    for (dtype, _), indices in together.items():
        own = [norms[index] for index in indices]
        magnitudes = torch.cat([sites[index].magnitude.flatten() for index in indices])
        joined = row_scale(magnitudes, torch.cat([norm.flatten() for norm in own]), dtype)
        parts = zip(*(field.split([norm.numel() for norm in own]) for field in joined), strict=True)
        for index, norm, fields in zip(indices, own, parts, strict=True):
            scales[index] = RowScale(*(field.view(norm.shape) for field in fields))
    return [scales[index] for index in range(len(sites))]


def row_norms(sites: Sequence[StoredParameters]) -> list[torch.Tensor]:
    """Row norms of W0 + s B A of several sites, `[out]` or this rank's `[out/tp]`, detached, float32 at least."""
    return _row_norms(sites, *_whole_factors(sites, None))


def _whole_factors(
    sites: Sequence[StoredParameters], cached: Sequence[CachedParameters] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    both = [*sites, *sites]
    stored = [_rows_first(site.lora_a, site) for site in sites] + [_rows_first(site.lora_b, site) for site in sites]
    wanted = [site.layout.gathers_lora_a for site in sites] + [site.layout.gathers_lora_b for site in sites]
    requests = [
        _Request(tensor, is_gathered, site.tp_group, site.dtype)
        for tensor, is_gathered, site in zip(stored, wanted, both, strict=True)
    ]
    if cached is None:
        whole = _together(gather_rows_coalesced, requests)
    else:
        at_hand = [cache.lora_a for cache in cached] + [cache.lora_b for cache in cached]
        gathered = [None if own is None else _rows_first(own, site) for own, site in zip(at_hand, both, strict=True)]
        leaves = [site.lora_a_leaf for site in sites] + [site.lora_b_leaf for site in sites]
        requests = [
            request if leaf is None or own is None else request._replace(tensor=own, wanted=False)
            for request, own, leaf in zip(requests, gathered, leaves, strict=True)
        ]
        whole = _lead_to_leaves(_together(substitute_gathered_rows, requests, gathered), leaves)
    whole = [_rows_first(factor, site) for factor, site in zip(whole, both, strict=True)]
    return whole[: len(sites)], whole[len(sites) :]


def _rows_first(factor: torch.Tensor, site: StoredParameters) -> torch.Tensor:
    """Exchange the dimensions of experts and rows of a grouped site's factor; that of any other has no experts."""
    return factor.transpose(0, 1) if site.is_grouped else factor


def _lead_to_leaves(tensors: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the tensors; the gradient of each that has a leaf goes to its leaf."""
    leaf_of = {index: leaf for index, leaf in enumerate(leaves) if leaf is not None}
    values = lead_gradients([tensors[index] for index in leaf_of], list(leaf_of.values()))
    result = list(tensors)
    for position, index in enumerate(leaf_of):
        result[index] = values[position]
    return result


def _row_norms(
    sites: Sequence[StoredParameters], lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    requests = []
    for site, a, b in zip(sites, lora_a, lora_b, strict=True):
        terms = _norm_terms(site, a, b)
        dtype = norm_dtype(site.dtype)
        requests += [_Request(terms[i], site.layout.shards_input_features, site.tp_group, dtype) for i in (0, 1)]
    whole = _together(reduce_from_group_coalesced, requests)
    norms = []
    for site, linear_terms, gram, b in zip(sites, whole[::2], whole[1::2], lora_b, strict=True):
        of_terms = grouped_norm_of_terms if site.is_grouped else norm_of_terms
        norms.append(of_terms(linear_terms, gram, b, scaling=site.scaling, dtype=norm_dtype(site.dtype)))
    return norms


def _norm_terms(
    site: StoredParameters, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = norm_dtype(site.dtype)
    squares = measured_base_norm(site) if site.base_norm_sq is None else site.base_norm_sq
    if site.expert_weights is None:
        return norm_terms(squares, site.weight, lora_a, lora_b, scaling=site.scaling, dtype=dtype)
    return grouped_norm_terms(squares, site.expert_weights, lora_a, lora_b, scaling=site.scaling, dtype=dtype)


def measured_base_norm(site: StoredParameters) -> torch.Tensor:
    """Squared row norms of a site's frozen weight, see `base_norm_squared`; `[experts, out]` of a grouped site."""
    if site.expert_weights is None:
        return base_norm_squared(site.weight)
    return grouped_base_norm_squared(site.expert_weights)


def _with_complete_gradients(
    sites: Sequence[StoredParameters], lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], ...]:
    """Whole factors and magnitudes; what of their gradients is partial goes in one message, in the norms' dtype."""
    requests = []
    for site, a, b in zip(sites, lora_a, lora_b, strict=True):
        over_tokens = site.layout.shards_tokens
        # Nobody reads the values of a magnitude after this, see `row_scale.py`.
        leaf = site.magnitude_leaf if site.magnitude_grad_is_partial else None
        magnitude = site.magnitude if leaf is None else leaf
        is_partial = site.magnitude_grad_is_partial and leaf is None
        for tensor, wanted in ((a, over_tokens), (b, over_tokens), (magnitude, is_partial)):
            requests.append(_Request(tensor, wanted, site.tp_group, norm_dtype(site.dtype)))
    whole = _together(copy_to_group_coalesced, requests)
    return whole[::3], whole[1::3], whole[2::3]


def _together(
    collective: Callable[..., Sequence[torch.Tensor]],
    requests: Sequence[_Request],
    *others: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Send every wanted tensor through one collective per group and dtype; the others come back as they are.

    Args:
        collective: takes tensors, the group, and of each of `others` the items that belong to the tensors.
    """
    results = [request.tensor for request in requests]
    messages: dict[tuple[str, torch.dtype], list[int]] = {}
    for index, request in enumerate(requests):
        if request.wanted and request.tp_group:
            messages.setdefault((request.tp_group, request.dtype), []).append(index)
    for (tp_group, _), indices in messages.items():
        tensors, *more = ([items[index] for index in indices] for items in (results, *others))
        completed = collective(tensors, tp_group, *more)
        for position, index in enumerate(indices):
            results[index] = completed[position]
    return results
