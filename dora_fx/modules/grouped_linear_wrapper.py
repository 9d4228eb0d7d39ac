"""`GroupedDoRALinear` wraps a layer that holds the linear layers of several experts.

The layer itself is called, and what DoRA adds is one function of all experts, `function/grouped_formula.py`. Nothing of
a call is left to a compiler but that function: Transformer Engine's layer is not traced by Dynamo, and how many tokens
each expert gets is known in Python in front of it. So the call is not traced either, whatever compiles the model around
it, and `compile_grouped_linears` has the one function compiled by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dora_fx.cache import are_covered, is_traced, refresh
from dora_fx.function import (
    DropoutFactors,
    SiteOperands,
    complete_parameters,
    drop_tokens,
    grouped_adapted_linear,
)
from dora_fx.modules.kinds import expert_weights, is_grouped_linear
from dora_fx.modules.linear_wrapper import DoRALinear
from dora_fx.modules.tensor_checks import check_buffers

# By the base layers, as adapters come and go.
_compiled: weakref.WeakKeyDictionary[nn.Module, Callable[..., torch.Tensor]] = weakref.WeakKeyDictionary()


class GroupedDoRALinear(DoRALinear):
    """The linear layers of several experts with DoRA adapters; a drop-in for the one layer that holds them.

    Its A is `[experts, dim, in]`, B `[experts, out, dim]` and m, flat, `[experts * out]`, of this rank's experts, each
    sharded over the expert-tensor-parallel group as that of one expert.
    """

    @property
    def expert_weights(self) -> tuple[torch.Tensor, ...]:
        """Return W0 of each expert, or this rank's shards."""
        return expert_weights(self.to_wrap)

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the base layer returns, with its output adapted.

        Args:
            x: `[tokens, in]`, sorted by experts.
            args, kwargs: the base layer's; the first are the numbers of tokens, one for each expert.

        Raises:
            ValueError: naming the path, if x does not fit the layer or the layer is in a state that would train
                another function.
        """
        if not self._adapter_enabled:
            return self.to_wrap(x, *args, **kwargs)
        counts = args[0] if args else kwargs["m_splits"]
        self._check_weights(x)
        self._check_counts(x, counts)
        output, *beside = self.to_wrap(x, *args, **kwargs)
        dropped = None
        if self.training and self.adapter.has_dropout:
            adapter = self.adapter
            factors = DropoutFactors(adapter.dropout_threshold, adapter.dropout_rescale)
            left = drop_tokens(x, factors, adapter.layout, adapter.tp_group)
            dropped = (left, self.to_wrap(left, *args, **kwargs)[0])
        adapted = self._adapted(x, output, dropped, counts)
        return (adapted.view_as(output), *beside)

    def _adapted(
        self, x: torch.Tensor, output: torch.Tensor, dropped: tuple[torch.Tensor, torch.Tensor] | None, counts: Any
    ) -> torch.Tensor:
        activations = [each.flatten(0, -2) for each in (x, output, *(dropped or ()))]
        first, second, *others = activations
        operands = (
            self.kind.added_bias(self.to_wrap),
            torch.as_tensor(counts, dtype=torch.int32, device=x.device),
            self._operands(x),
            self.adapter.scaling_factor,
            tuple(others) or None,
        )
        # Graphs of no token and of one would be graphs of their own.
        if first.shape[0] < 2 or is_traced(x):
            return grouped_adapted_linear(first, second, *operands)
        for activation in activations:
            torch._dynamo.maybe_mark_dynamic(activation, 0)
        formula = _compiled.get(self.to_wrap, grouped_adapted_linear)
        return formula(first, second, *operands)

    def _operands(self, x: torch.Tensor) -> SiteOperands:
        """Return the factors, m and scales of a call; under a tracer they are computed anew, as in `marker.mark`."""
        site = self.cached_site()
        if is_traced(x, site.stored.lora_a):
            return complete_parameters([site.stored._replace(base_norm_sq=None)])[0]
        check_buffers(self.path, site.stored, site.cached)
        if not are_covered([site.cached.delta]):
            refresh([site])
        return complete_parameters([site.stored], [site.cached])[0]

    def _check_weights(self, x: torch.Tensor) -> None:
        """Check the call and the adapter once, with the weight that differs from the first one if any does."""
        first, *others = self.expert_weights
        self._check_call(x, next((weight for weight in others if weight.requires_grad), first))
        kind = (first.dtype, first.device, first.shape)
        odd = (weight for weight in others if (weight.dtype, weight.device, weight.shape) != kind)
        self.check_adapter(next(odd, first))

    def _check_counts(self, x: torch.Tensor, counts: Sequence[int] | torch.Tensor) -> None:
        """Raise ValueError unless there is a count for each expert, and together they are all tokens.

        A tensor's elements are not read: that would wait for the device.
        """
        experts, tokens = len(self.expert_weights), x.shape[:-1].numel()
        if len(counts) != experts:
            raise ValueError(f"{self.path}: found {len(counts)} numbers of tokens, expected one for each of {experts}")
        if not isinstance(counts, torch.Tensor) and sum(counts) != tokens:
            raise ValueError(
                f"{self.path}: found {tokens} tokens, expected the sum of the experts' numbers, {sum(counts)}"
            )


def compile_grouped_linears(modules: Iterable[nn.Module], settings: Mapping[str, Any]) -> None:
    """Compile what adapters add to the grouped layers among base layers, those that they have or may get.

    Args:
        modules: of a model, in which other modules are left alone.
        settings: of `torch.compile`. The function has no part that could break its graph, and its numbers of tokens are
            dynamic, whatever they say: each call has another one.
    """
    formula = torch.compile(grouped_adapted_linear, **{**settings, "fullgraph": True, "dynamic": None})
    _compiled.update((module, formula) for module in modules if is_grouped_linear(module))
