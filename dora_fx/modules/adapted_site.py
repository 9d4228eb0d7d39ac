"""The state of one adapted layer: its base layer, its adapter, and the buffers that are computed from both.

The parameters are the adapter's (`adapter.py`). What follows from them and from the base weight is in buffers of the
wrapper, which `cache/parameter_cache.py` fills and `freshness.py` checks. Gradients that are completed once per step
are added up by the accumulators of `partial_gradients.py`. A call takes all of it as two records, `StoredParameters`
and `CachedParameters`, which are all that the formula, the marker and the cache know of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from dora_fx.cache import (
    CachedSite,
    SiteTensors,
    StepCount,
    empty_base_norm,
    empty_cache,
    have_no_values,
    measure_base,
    note_step_count,
)
from dora_fx.function import (
    BaseWeight,
    CachedParameters,
    QuantisedWeight,
    StoredParameters,
    norm_dtype,
    row_norms,
    sources_of,
    tensors_of,
)
from dora_fx.modules.adapter import Factors, ParallelLinearDoRAAdapter
from dora_fx.modules.base_attributes import BaseAttributes
from dora_fx.modules.kinds import LinearKind
from dora_fx.modules.partial_gradients import GradientCompletion, SiteAccumulators, leaves_for, make_accumulators
from dora_fx.modules.site_paths import note_path
from dora_fx.modules.written_parameters import guard_optimizers, note_loaded

_CACHE_BUFFERS = tuple(f"cached_{name}" for name in CachedParameters._fields)


class AdaptedSite(BaseAttributes):
    """A linear layer with an adapter and everything that is kept for it; `DoRALinear` adds the call.

    Args:
        to_wrap, path, kind, base_weight: see `BaseAttributes`.
        adapter: a missing magnitude is set to the norm.
        complete_gradients: see `DoRA`.
    """

    base_norm_sq: torch.Tensor

    def __init__(
        self,
        to_wrap: nn.Module,
        adapter: ParallelLinearDoRAAdapter,
        path: str,
        kind: type[LinearKind],
        base_weight: nn.Parameter | None,
        complete_gradients: GradientCompletion,
    ) -> None:
        super().__init__(to_wrap, path, kind, base_weight)
        self.adapter = adapter
        for name in ("base_norm_sq", *_CACHE_BUFFERS):
            self.register_buffer(name, None, persistent=False)
        self.invalidate_norm()
        # An accumulator has the shape and dtype of its parameter, and the magnitude's first value takes a norm.
        self._accumulators, self.complete_gradients = SiteAccumulators(), complete_gradients
        if adapter.weight_magnitude is None:
            is_valueless = have_no_values(*tensors_of(self.base_weight))
            adapter.init_weight_magnitude(self.base_norm_sq if is_valueless else self._get_weight_norm())
            note_path(adapter, path)
        self._accumulators = make_accumulators(adapter, path, complete_gradients)
        self.step_count: StepCount | None = None
        guard_optimizers()
        self.register_load_state_dict_post_hook(_after_load_state_dict)

    def site_tensors(self) -> SiteTensors:
        """Return the tensors that the check in front of a call compares.

        Every call of a model reads those of all its layers, so they are taken from where `nn.Module` looks last.
        """
        adapter: Any = self._modules["adapter"]
        buffers: dict[str, Any] = self._buffers
        magnitude = _parameter_of(adapter, "weight_magnitude")
        factors = [_parameter_of(adapter._modules[name], "weight") for name in ("linear_in", "linear_out")]
        sources = (*factors, magnitude, buffers["base_norm_sq"], adapter._buffers["scaling_factor"])
        delta, *values = (buffers[name] for name in _CACHE_BUFFERS)
        weights = self.expert_weights or sources_of(self.base_weight)
        return SiteTensors(delta, tuple(each for each in values if each is not None), sources, weights)

    @property
    def expert_weights(self) -> tuple[torch.Tensor, ...] | None:
        """Return W0 of each expert of a grouped layer, whose `base_weight` is the first; None for any other layer."""
        return None

    @property
    def base_weights(self) -> tuple[BaseWeight, ...]:
        """Return the weights of the matrices that are adapted: one, or that of each expert of a grouped layer."""
        return self.expert_weights or (self.base_weight,)

    @property
    def num_partial_sums(self) -> int:
        """Return how many numbers this rank adds up within a step where Megatron's wrapper reduces the gradients."""
        lora_a, lora_b, magnitude = self._accumulators
        if not self.adapter.layout.magnitude_grad_is_partial(dropout=self.adapter.has_dropout):
            magnitude = None
        return sum(each.leaf.numel() for each in (lora_a, lora_b, magnitude) if each is not None)

    @torch.inference_mode(False)
    def invalidate_norm(self) -> None:
        """Forget the norms of the base weight and all that is cached of the adapter, on this rank alone.

        The next forward pass, where all ranks are, computes them.
        """
        adapter, weight = self.adapter, self.base_weight
        adapter.set_factors()
        num_experts = None if self.expert_weights is None else len(self.expert_weights)
        self.base_norm_sq = empty_base_norm(weight, num_experts)
        cached = empty_cache(
            self.base_norm_sq, adapter.linear_in.weight, adapter.linear_out.weight, adapter.layout, adapter.tp_group
        )
        for name, buffer in zip(_CACHE_BUFFERS, cached, strict=True):
            setattr(self, name, buffer)
        note_path(adapter, self.path)

    @torch.inference_mode(False)
    def _fit_to_parameters(self) -> None:
        """Allocate buffers and accumulators anew where parameters have got another dtype or device than these.

        Values are not compared here: buffers are cast and moved with the module, and the next refresh compares the
        bits.
        """
        weight = self.base_weight
        # A load or a move may have put other parameters in the place of those whose path is known.
        note_path(self.adapter, self.path)
        self.count_steps(self.step_count)
        if self.base_norm_sq.dtype != norm_dtype(weight.dtype) or self.base_norm_sq.device != weight.device:
            self.invalidate_norm()
        if not self._accumulators.fit_parameters():
            self._accumulators = make_accumulators(self.adapter, self.path, self.complete_gradients)

    def count_steps(self, count: StepCount | None) -> None:
        """Have an optimizer's steps of this adapter counted apart from those of others; None for a lone adapter."""
        self.step_count = count
        if count is not None:
            note_step_count(self.adapter.parameters(), count)

    @torch.no_grad()
    def _get_weight_norm(self) -> torch.Tensor:
        """Return the row norms of W0 + scaling * B A, `[out]` or this rank's `[out/tp]`, float32 at least, detached.

        Every rank of the layer's tensor-parallel group calls it.
        """
        site = self.cached_site()
        measure_base(site)
        return row_norms([site.stored])[0]

    def matrix_parameters(self, index: int) -> StoredParameters:
        """Return the parameters of one of `base_weights` by itself, outside any call."""
        site = self.cached_site()
        if site.stored.is_grouped:
            return site.stored.of_expert(index)
        measure_base(site)
        return site.stored

    @torch.no_grad()
    def matrix_norm(self, index: int) -> torch.Tensor:
        """Return the row norms of one of `base_weights` with its adapter, as `_get_weight_norm` does those of all."""
        return row_norms([self.matrix_parameters(index)])[0]

    def matrix_factors(self, index: int) -> Factors:
        """Return A, B and m of one of `base_weights`, or this rank's shards; of a grouped layer views of them."""
        factors = self.factors()
        if self.expert_weights is None:
            return factors
        lora_a, lora_b, magnitude = factors
        return Factors(lora_a[index], lora_b[index], magnitude.view(len(self.expert_weights), -1)[index])

    def cached_site(self) -> CachedSite:
        """Return the parameters outside any call and the buffers made of them, for `parameter_cache.refresh`."""
        stored = self.stored_parameters(self.base_weight, self.adapter.layout_name, drops=False)
        return CachedSite(self.path, stored, self.cached_parameters())

    def stored_parameters(
        self, weight: BaseWeight, layout_name: str, *, drops: bool, factors: Factors | None = None
    ) -> StoredParameters:
        """Return what a call reads of the parameters.

        Args:
            weight: W0 of the call, `[out, in]` or this rank's shard.
            layout_name: of the call; Megatron switches an output layer's collectives for single calls.
            drops: the call is one with dropout.
            factors: in a mixed batch, A, B and m or aliases of them, to be read in place of the adapter's.
        """
        adapter = self.adapter
        lora_a, lora_b, own_magnitude = self.factors() if factors is None else factors
        lora_a_leaf, lora_b_leaf, magnitude_leaf = leaves_for(self._accumulators, (lora_a, lora_b, own_magnitude))
        magnitude: torch.Tensor | None = own_magnitude
        if self.expert_weights is not None and magnitude is not None:
            magnitude = magnitude.view_as(self.base_norm_sq)
            magnitude_leaf = None if magnitude_leaf is None else magnitude_leaf.view(magnitude.shape)
        return StoredParameters(
            weight=weight,
            base_norm_sq=self.base_norm_sq,
            lora_a=lora_a,
            lora_b=lora_b,
            # The norm that a magnitude starts as is computed before there is one, and does not depend on it.
            magnitude=self.base_norm_sq if magnitude is None else magnitude,
            scaling=adapter.scaling_factor,
            dropout_threshold=adapter.dropout_threshold if drops else None,
            dropout_rescale=adapter.dropout_rescale if drops else None,
            layout_name=layout_name,
            tp_group=adapter.tp_group,
            dtype=weight.dtype,
            lora_a_leaf=lora_a_leaf,
            lora_b_leaf=lora_b_leaf,
            magnitude_leaf=magnitude_leaf,
            expert_weights=self.expert_weights,
        )

    def factors(self) -> Factors:
        """Return the adapter's A, B and m, or this rank's shards; m may be None while the layer is being adapted."""
        adapter = self.adapter
        return Factors(adapter.linear_in.weight, adapter.linear_out.weight, adapter.weight_magnitude)

    def cached_parameters(self) -> CachedParameters:
        """Return the buffers of what follows from the parameters; they may be out of date until a refresh."""
        return CachedParameters(*(getattr(self, name) for name in _CACHE_BUFFERS))

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._fit_to_parameters()
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the base layer's sharded tensors under its own keys, and the adapter's under `adapter.`.

        A quantised weight is what is stored of it: `weight`, `weight.1` and so on.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        if isinstance(self.base_weight, QuantisedWeight):
            tensors = enumerate(sources_of(self.base_weight))
            own = {f"weight.{index}" if index else "weight": tensor for index, tensor in tensors}
            own |= {} if self.bias is None else {"bias": self.bias}
            base = make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets)
        else:
            base = sharded_state_dict_default(self.to_wrap, prefix, sharded_offsets, metadata)
        return {
            **base,
            **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata),
        }


def _parameter_of(module: Any, name: str) -> torch.Tensor:
    """Return `module.name`, which may be a parameter that a wrapper took out of the module and set as an attribute."""
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else getattr(module, name)


def _after_load_state_dict(site: AdaptedSite, incompatible_keys: Any) -> None:
    site._fit_to_parameters()
    # torch loads the parameters alone. An optimizer's float32 copies would overwrite them at its next step.
    note_loaded(site.adapter.parameters())
