"""`DoRALinear` wraps one linear layer and computes with the parameters that its adapter holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default
from torch import nn
from torch.utils.hooks import RemovableHandle

from dora_fx.cache import CachedSite, empty_base_norm, empty_cache, measure_base
from dora_fx.function import CachedParameters, StoredParameters, norm_dtype, row_norms
from dora_fx.megatron import Model, capture_megatron_whole, chunks_of, is_parameter_gather_hook
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter
from dora_fx.modules.base_attributes import BaseAttributes
from dora_fx.modules.kinds import describe_linear
from dora_fx.modules.marker import MarkedSite, mark
from dora_fx.modules.partial_gradients import CompleteGradients, PartialGradients, leaves_for, partial_gradients
from dora_fx.modules.site_paths import note_path
from dora_fx.modules.tensor_checks import check_buffers, check_factors, check_magnitude
from dora_fx.modules.written_parameters import guard_optimizers, note_loaded
from dora_fx.ranks import group_size

_CACHE_BUFFERS = tuple(f"cached_{name}" for name in CachedParameters._fields)


class DoRALinear(BaseAttributes):
    """A linear layer with a DoRA adapter; a drop-in for the layer it wraps, with its attributes.

    The base layer's state-dict keys do not change; the adapter's are under `adapter.`.

    Args:
        to_wrap: a frozen layer of one of `kinds.KINDS`.
        adapter: its DoRA parameters. A missing magnitude starts as the norm, so attaching changes nothing.
        path: the module's path in its model, for error messages.
        base_weight: the weight of a layer that has none of its own (an output layer tied to the embedding).
        complete_gradients: see `DoRA`.
    """

    base_norm_sq: torch.Tensor

    def __init__(
        self,
        to_wrap: nn.Module,
        adapter: ParallelLinearDoRAAdapter,
        *,
        path: str = "",
        base_weight: nn.Parameter | None = None,
        complete_gradients: CompleteGradients = "auto",
    ) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        self.adapter = adapter
        self.path = path or type(to_wrap).__name__
        self.kind = describe_linear(self.path, to_wrap).kind
        self._borrowed_weight = (base_weight,)
        self._adapter_enabled = True
        for name in ("base_norm_sq", *_CACHE_BUFFERS):
            self.register_buffer(name, None, persistent=False)
        self.invalidate_norm()
        self._partial_gradients, self.complete_gradients = PartialGradients(), complete_gradients
        if not hasattr(adapter, "weight_magnitude"):
            adapter.init_weight_magnitude(self._get_weight_norm())
            note_path(adapter, self.path)
        self._partial_gradients = partial_gradients(adapter, self.path, complete_gradients)
        guard_optimizers()
        self._register_load_state_dict_pre_hook(self._rename_base_keys)
        self.register_load_state_dict_post_hook(_after_load_state_dict)

    @property
    def scaling(self) -> float:
        """The factor of the low-rank product."""
        return self.adapter.scaling

    @property
    def num_partial_sums(self) -> int:
        """Elements of the gradients that this rank keeps as partial sums within a step, if any wrapper reduces them."""
        lora_a, lora_b, magnitude = self._partial_gradients
        if not self.adapter.layout.magnitude_grad_is_partial(dropout=self.adapter.has_dropout):
            magnitude = None
        return sum(partial.leaf.numel() for partial in (lora_a, lora_b, magnitude) if partial is not None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the base layer returns, with its output adapted.

        Args:
            x: the base layer's input, `[s, b, h]` or `[tokens, h]`.
            args, kwargs: passed on to the base layer.

        Returns:
            `(output, bias)` for Megatron's layers, a tensor for `nn.Linear`.

        Raises:
            ValueError: naming the path, if x does not fit the layer or the layer is in a state that would
                train another function: a base weight that requires grad, a tensor of the adapter that has another
                dtype or is on another device.
        """
        if not self._adapter_enabled:
            return self.to_wrap(x, *args, **kwargs)
        weight = args[0] if args else kwargs.get("weight")
        if weight is None:
            weight = self.base_weight
        self._check_call(x, weight)
        _check_group_exists(self.adapter.tp_group)
        if torch.compiler.is_compiling():
            _prepare_trace()
        adapter = self.adapter
        layout_name = self.kind.layout_name(self.to_wrap, *args, **kwargs)
        if self.kind.calls_base(self.to_wrap):
            returned = self.to_wrap(x, *args, **kwargs)
            base_output, beside = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
        else:
            base_output, beside = None, self.kind.returned_beside_output(self.to_wrap)
        stored = self._stored(weight, layout_name, self.training and adapter.has_dropout)
        bias = self.kind.added_bias(self.to_wrap)
        norm = self.kind.input_norm(self.to_wrap)
        cached = self._cached()
        check_buffers(self.path, stored, cached)
        output = mark(MarkedSite(base_output, x, bias, stored, cached, norm))
        return output if beside is None else (output, *beside)

    def _check_call(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        if weight.requires_grad:
            raise ValueError(
                f"{self.path}: the base weight requires grad; DoRA trains a frozen base. "
                "Call requires_grad_(False) on it, or merge the adapter before training the base."
            )
        if (problem := self.kind.call_problem_maybe(self.to_wrap)) is not None:
            raise ValueError(f"{self.path}: {problem}")
        features = weight.shape[1] * (self.adapter.tp_size if self.adapter.layout.enter == "split_features" else 1)
        if x.shape[-1] != features:
            raise ValueError(f"{self.path}: the input has {x.shape[-1]} features, the layer takes {features}")
        check_factors(self.path, self.adapter, weight)
        check_magnitude(self.path, self.adapter.weight_magnitude, weight, self.base_norm_sq)

    @torch.inference_mode(False)
    def invalidate_norm(self) -> None:
        """Forget the norms of the base weight and all that is cached of the adapter, on this rank alone.

        The next forward pass, where all ranks are, computes them.
        """
        adapter, weight = self.adapter, self.base_weight
        adapter.set_factors()
        self.base_norm_sq = empty_base_norm(weight)
        cached = empty_cache(
            self.base_norm_sq, adapter.linear_in.weight, adapter.linear_out.weight, adapter.layout, adapter.tp_group
        )
        for name, buffer in zip(_CACHE_BUFFERS, cached, strict=True):
            setattr(self, name, buffer)
        note_path(adapter, self.path)

    @torch.inference_mode(False)
    def _fit_buffers(self) -> None:
        """Forget what is cached if parameters have got another dtype or device than the buffers.

        Values that merely moved moved with the buffers; `freshness.py` finds out.
        """
        weight = self.base_weight
        note_path(self.adapter, self.path)
        if self.base_norm_sq.dtype != norm_dtype(weight.dtype) or self.base_norm_sq.device != weight.device:
            self.invalidate_norm()
        if not self._partial_gradients.fit_parameters():
            self._partial_gradients = partial_gradients(self.adapter, self.path, self.complete_gradients)

    @torch.no_grad()
    def _get_weight_norm(self) -> torch.Tensor:
        """Row norms of W0 + scaling * B A, `[out]` or this rank's `[out/tp]`, float32 at least, detached.

        Every rank of the layer's tensor-parallel group calls it.
        """
        site = self.cached_site()
        measure_base(site)
        return row_norms([site.stored])[0]

    def cached_site(self) -> CachedSite:
        """Return the parameters outside any call and the buffers made of them, for `parameter_cache.refresh`."""
        return CachedSite(self.path, self._stored(self.base_weight, self.adapter.layout_name, False), self._cached())

    def _stored(self, weight: torch.Tensor, layout_name: str, drops: bool) -> StoredParameters:
        adapter = self.adapter
        lora_a_leaf, lora_b_leaf, magnitude_leaf = leaves_for(self._partial_gradients, adapter)
        return StoredParameters(
            weight=weight,
            base_norm_sq=self.base_norm_sq,
            lora_a=adapter.linear_in.weight,
            lora_b=adapter.linear_out.weight,
            # A norm does not depend on the magnitude, which is initialised with it.
            magnitude=getattr(adapter, "weight_magnitude", self.base_norm_sq),
            scaling=adapter.scaling_factor,
            dropout_threshold=adapter.dropout_threshold if drops else None,
            dropout_rescale=adapter.dropout_rescale if drops else None,
            layout_name=layout_name,
            tp_group=adapter.tp_group,
            dtype=weight.dtype,
            lora_a_leaf=lora_a_leaf,
            lora_b_leaf=lora_b_leaf,
            magnitude_leaf=magnitude_leaf,
        )

    def _cached(self) -> CachedParameters:
        return CachedParameters(*(getattr(self, name) for name in _CACHE_BUFFERS))

    def enable_adapter_layers(self) -> None:
        """Let the adapter take part in the forward pass."""
        self._adapter_enabled = True

    def disable_adapter_layers(self) -> None:
        """Make the forward pass that of the base layer alone."""
        self._adapter_enabled = False

    def register_forward_pre_hook(self, hook: Callable[..., Any], **kwargs: Any) -> RemovableHandle:
        """Register a hook as any module does, but refuse that of a parameter gather that overlaps the forward pass.

        Raises:
            ValueError: Megatron's DistributedDataParallel registers such a hook on every module, to wait for the
                parameters of that module alone. Norms are computed before any hook runs.
        """
        if is_parameter_gather_hook(hook):
            raise ValueError(
                f"{self.path}: found DistributedDataParallel with overlap_param_gather=True, expected False: "
                "the norms of a step need the parameters before the forward pass begins"
            )
        return super().register_forward_pre_hook(hook, **kwargs)

    def backward_dw(self) -> None:
        """Delayed weight gradients of the base layer: a frozen layer has none, Megatron calls it all the same."""
        if self.base_weight.requires_grad:
            self.to_wrap.backward_dw()

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._fit_buffers()
        return self

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The base layer's entries under the keys it has without an adapter, and the adapter's."""
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        wrapped = f"{prefix}to_wrap."
        for key in [key for key in destination if key.startswith(wrapped)]:
            destination[prefix + key.removeprefix(wrapped)] = destination.pop(key)
        return destination

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The base layer's sharded tensors under its own keys, and the adapter's under `adapter.`."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return {
            **sharded_state_dict_default(self.to_wrap, prefix, sharded_offsets, metadata),
            **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata),
        }

    def _rename_base_keys(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        children = (f"{prefix}adapter.", f"{prefix}to_wrap.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(children)]:
            state_dict[f"{prefix}to_wrap.{key.removeprefix(prefix)}"] = state_dict.pop(key)


@torch.compiler.assume_constant_result
def _check_group_exists(tp_group: str) -> int:
    """Raise RuntimeError, while Dynamo traces a call too, if the group is gone: Megatron's own error names nothing."""
    return group_size(tp_group)


@torch.compiler.assume_constant_result
def _prepare_trace() -> None:
    """Any compiler's Dynamo is about to trace the base layer; with this package's backend it was prepared before."""
    capture_megatron_whole()


def _after_load_state_dict(module: DoRALinear, incompatible_keys: Any) -> None:
    for keys in incompatible_keys:
        keys[:] = [key.replace(".to_wrap.", ".").removeprefix("to_wrap.") for key in keys]
    module._fit_buffers()
    note_loaded(module.adapter.parameters())


def invalidate_norms(model: Model) -> None:
    """Forget everything that is cached of a model's adapters, and the base's norms.

    Needed only after writes that nothing tells: on an accelerator those past PyTorch's version counter (through
    `.data`, say) outside an optimizer's step, which raise StaleParametersError in a later forward pass; everywhere such
    writes into a few rows of a base weight. Steps, in-place writes, loads, casts and moves are noticed, on a CPU every
    write into an adapter.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped. Every rank of a tensor-parallel group
            calls it.
    """
    for chunk in chunks_of(model):
        for module in chunk.modules():
            if isinstance(module, DoRALinear):
                module.invalidate_norm()


@contextmanager
def disable_adapter(model: Model) -> Iterator[None]:
    """Within the context every adapter of the model is off; each returns to the state it had before.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped.
    """
    sites = [module for chunk in chunks_of(model) for module in chunk.modules() if isinstance(module, DoRALinear)]
    before = [site._adapter_enabled for site in sites]
    try:
        for site in sites:
            site.disable_adapter_layers()
        yield
    finally:
        for site, enabled in zip(sites, before, strict=True):
            site._adapter_enabled = enabled
