"""`DoRALinear` wraps one linear layer and computes with the parameters that its adapter holds.

`adapted_site.py` has its state, `base_attributes.py` the attributes by which it stands in for the layer. Here is the
call: check it, let the base layer do its part, and hand the rest to the marker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dora_fx.function import BaseWeight, QuantisedWeight
from dora_fx.megatron import capture_megatron_whole, is_parameter_gather_hook
from dora_fx.modules.adapted_site import AdaptedSite
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter
from dora_fx.modules.kinds import LinearSpec, describe_linear
from dora_fx.modules.marker import AdapterTensors, MarkedSite, mark
from dora_fx.modules.partial_gradients import GradientCompletion
from dora_fx.modules.site_mixture import SiteMixture
from dora_fx.modules.tensor_checks import check_buffers, check_factors, check_magnitude
from dora_fx.ranks import group_size


class DoRALinear(AdaptedSite):
    """A linear layer with a DoRA adapter; a drop-in for the layer it wraps, with its attributes.

    The base layer's state-dict keys do not change; the adapter's are under `adapter.`.

    Args:
        to_wrap: a frozen layer of one of `kinds.KINDS`.
        adapter: its DoRA parameters. A missing magnitude starts as the norm, so attaching changes nothing.
        path: the module's path in its model, for error messages.
        base_weight: the weight of a layer that has none of its own (an output layer tied to the embedding).
        complete_gradients: see `DoRA`.

    Raises:
        TypeError, ValueError: the layer is of no kind or refused by its kind, the adapter is one for another layer, or
            `complete_gradients` is no known way.
    """

    def __init__(
        self,
        to_wrap: nn.Module,
        adapter: ParallelLinearDoRAAdapter,
        *,
        path: str = "",
        base_weight: nn.Parameter | None = None,
        complete_gradients: GradientCompletion = "auto",
    ) -> None:
        path = path or type(to_wrap).__name__
        spec = describe_linear(path, to_wrap)
        _check_adapter(path, adapter, spec)
        if complete_gradients not in get_args(GradientCompletion):
            raise ValueError(
                f"{path}: found complete_gradients = {complete_gradients!r}, "
                f"expected one of {list(get_args(GradientCompletion))}"
            )
        super().__init__(to_wrap, adapter, path, spec.kind, base_weight, complete_gradients)
        self._adapter_enabled = True
        self._mixture: SiteMixture | None = None

    @property
    def is_adapting(self) -> bool:
        """Return whether the adapter takes part in calls."""
        return self._adapter_enabled

    def sites_of_call(self) -> list[AdaptedSite]:
        """Return the adapters that a call now reads: this one, or all of a mixed batch."""
        return [self] if self._mixture is None else [each.site for each in self._mixture.adapters]

    def check_mixture(self) -> None:
        """Raise RuntimeError, naming the path, if an adapter of a mixed batch got other parameters since it began."""
        if self._mixture is not None and not all(each.are_current() for each in self._mixture.adapters):
            raise RuntimeError(
                f"{self.path}: found other parameters than when the mixed batch began, expected the same: load "
                "adapters in front of the context of dora_fx.mixed"
            )

    @property
    def scaling(self) -> float:
        """Return the factor of the low-rank product."""
        return self.adapter.scaling

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
        mixture = self._mixture
        self._check_call(x, weight)
        if mixture is None:
            # The adapters of a mixed batch are checked where the batch begins.
            self.check_adapter(weight)
        _check_group_exists(self.adapter.tp_group)
        if torch.compiler.is_compiling():
            _prepare_trace()
        layout_name = self.kind.layout_name(self.to_wrap, *args, **kwargs)
        base_output, beside = self._call_base(x, *args, **kwargs)
        bias = self.kind.added_bias(self.to_wrap)
        norm = self.kind.input_norm(self.to_wrap)
        (stored, cached), *others = self._adapters_of_call(weight, layout_name)
        samples = None if mixture is None else mixture.samples_of(self.path, x, stored.layout)
        if isinstance(weight, QuantisedWeight):
            # Its layer takes x in any dtype.
            x = x.to(weight.dtype)
        output = mark(MarkedSite(base_output, x, bias, stored, cached, norm, tuple(others), samples))
        return output if beside is None else (output, *beside)

    def _adapters_of_call(self, weight: BaseWeight, layout_name: str) -> list[AdapterTensors]:
        """Return what the call reads of its adapter, or of each adapter of a mixed batch."""
        mixture = self._mixture
        if mixture is None:
            drops = self.training and self.adapter.has_dropout
            all_stored = [self.stored_parameters(weight, layout_name, drops=drops)]
            all_cached = [self.cached_parameters()]
        else:
            all_stored = mixture.stored_parameters(weight, layout_name, drops=mixture.drops(training=self.training))
            all_cached = mixture.cached_parameters()
        for stored, cached in zip(all_stored, all_cached, strict=True):
            check_buffers(self.path, stored, cached)
        return [AdapterTensors(*each) for each in zip(all_stored, all_cached, strict=True)]

    def _call_base(
        self, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor | None, ...] | None]:
        """Return the base layer's output, None where the formula computes it, and what the layer returns after it.

        The second is None for a layer that returns its output alone.
        """
        if not self.kind.calls_base(self.to_wrap):
            return None, self.kind.returned_beside_output(self.to_wrap)
        returned = self.to_wrap(x, *args, **kwargs)
        return (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)

    def _check_call(self, x: torch.Tensor, weight: BaseWeight) -> None:
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

    def check_adapter(self, weight: BaseWeight) -> None:
        """Raise ValueError, naming the path, where a tensor of the adapter has another dtype, shape or device."""
        check_factors(self.path, self.adapter, weight)
        magnitude = self.adapter.weight_magnitude
        # Those of a grouped layer are flat.
        norm = self.base_norm_sq if self.expert_weights is None else self.base_norm_sq.flatten()
        check_magnitude(self.path, magnitude, weight, norm)

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


def _check_adapter(path: str, adapter: ParallelLinearDoRAAdapter, spec: LinearSpec) -> None:
    """Raise ValueError, naming the path, if an adapter was made for a layer of other sizes or another layout."""
    expected: dict[str, Any] = {name: getattr(spec, name) for name in ("in_features", "out_features", "row_blocks")}
    expected |= {"layout_name": spec.layout.name, "tp_group": spec.tp_group_name}
    for name, value in expected.items():
        if getattr(adapter, name) != value:
            found = f"found an adapter with {name} = {getattr(adapter, name)!r}"
            raise ValueError(f"{path}: {found}, expected the layer's {value!r}")


@torch.compiler.assume_constant_result
def _check_group_exists(tp_group: str) -> int:
    """Raise RuntimeError, while Dynamo traces a call too, if the group is gone: Megatron's own error names nothing."""
    return group_size(tp_group)


@torch.compiler.assume_constant_result
def _prepare_trace() -> None:
    """Set Dynamo up for Megatron's layers, where another backend than this package's is about to trace one.

    This package's backend has done so when it was imported.
    """
    capture_megatron_whole()
