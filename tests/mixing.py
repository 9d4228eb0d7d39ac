"""A mixed batch beside the same batch with each of its adapters alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import dora_fx
from tests.closeness import assert_apart, assert_below, relative_error
from tests.models import trainable

Outputs = dict[str, torch.Tensor]
# In float64: layers of a tiny model, forward and backward.
BOUND = 1e-13


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What an adapter trains, by name."""
    with dora_fx.adapter(model, name):
        return trainable(model)


def own_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor | None]:
    """Take the gradients that backward passes left."""
    found = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


class Mixing:
    """Outputs and gradients of each adapter alone, of the samples or tokens that are its own.

    Args:
        model: with the adapters.
        call: calls the model or what was compiled of it, and returns its outputs by name.
        masks: adapter, or None for the base -> for each output, one where a sample or token is the adapter's.
        take: takes the gradients of one adapter's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[], Outputs],
        masks: Mapping[str | None, Outputs],
        take: Callable[[Mapping[str, nn.Parameter]], dict[str, Any]] = own_gradients,
    ) -> None:
        self.model, self.take = model, take
        self.parameters = {name: parameters_of(model, name) for name in dora_fx.adapter_names(model)}
        self.outputs: Outputs = {}
        self.gradients: dict[str, dict[str, Any]] = {}
        self.expected_of: dict[str | None, Outputs] = {}
        for name, masks_of in masks.items():
            with dora_fx.disable_adapter(model) if name is None else dora_fx.adapter(model, name):
                outputs = call()
                self.expected_of[name] = {key: value.detach() for key, value in outputs.items()}
                for key, value in outputs.items():
                    part = value.detach() * masks_of[key]
                    self.outputs[key] = self.outputs[key] + part if key in self.outputs else part
                if name is not None:
                    self.loss(outputs, masks_of).backward()
                    self.gradients[name] = take(self.parameters[name])

    @staticmethod
    def loss(outputs: Outputs, masks: Outputs | None = None) -> torch.Tensor:
        """A loss with another weight for each element of each output."""
        total = torch.zeros((), dtype=torch.float64)
        for key, value in outputs.items():
            generator = torch.Generator().manual_seed(5)
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            total = total + (value * weights * (1.0 if masks is None else masks[key])).sum()
        return total

    def check(self, outputs: Outputs, bound: float = BOUND) -> None:
        """Run the backward pass of a mixed batch and compare everything; adapters without samples have no gradient."""
        self.loss(outputs).backward()
        assert_below({key: relative_error(value, self.outputs[key]) for key, value in outputs.items()}, bound)
        for name, parameters in self.parameters.items():
            found, expected = self.take(parameters), self.gradients.get(name)
            if expected is None:
                assert [key for key, value in found.items() if value is not None] == [], name
            else:
                errors = {f"{name}: {key}": relative_error(found[key], value) for key, value in expected.items()}
                assert_below(errors, bound)


def assert_all_apart(outputs: Sequence[Outputs]) -> None:
    """Raise AssertionError if any two of the outputs are alike, so that comparing them would say little."""
    for one, other in itertools.combinations(outputs, 2):
        for key in one:
            assert_apart(one[key], other[key], 0.01)
