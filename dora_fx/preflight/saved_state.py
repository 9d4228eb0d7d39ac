"""Saves and restores the state that a check changes: parameters, optimizer, gradients, modes and random states."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch import nn

from dora_fx.modules import DoRALinear
from dora_fx.preflight.optimizers import single_optimizers, torch_optimizers


class RandomState:
    """A copy of the state of all generators that a pass may draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        # Megatron's own generators of tensor-parallel regions.
        self._tracker = copy.copy(megatron_random.get_cuda_rng_tracker().get_states())

    def restore(self) -> None:
        """Set the generators to the saved state."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        megatron_random.get_cuda_rng_tracker().set_states(copy.copy(self._tracker))


class SavedValues:
    """Copies of tensors, which can be written back in place."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values back, except into tensors that hold them: a write invalidates cached norms."""
        for tensor, value in self._pairs:
            if not _same_bits(tensor, value):
                tensor.copy_(value)


@contextmanager
def left_as_it_was(chunks: Sequence[nn.Module], optimizer: Any) -> Iterator[SavedValues]:
    """Restore the set-up bit by bit at the end of the block; yield the values, which can be restored earlier.

    Parameters that are trainable or in the optimizer are copied. Other parameters are not, since no step writes them.
    """
    inner = torch_optimizers(optimizer)
    modules = [module for chunk in chunks for module in chunk.modules()]
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    trained = [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
    parameters = list(dict.fromkeys([*(parameter for parameter in own if parameter.requires_grad), *trained]))
    values = SavedValues([*parameters, *_buffers(modules)])
    gradients = [_Gradient(parameter) for parameter in parameters]
    optimizers = [_OptimizerState(each) for each in inner]
    scalers = [_Scaler(single) for single in single_optimizers(optimizer)]
    modes = [(module, module.training) for module in modules]
    generators = RandomState()
    try:
        yield values
    finally:
        values.restore()
        for restore in (part.restore for parts in (gradients, optimizers, scalers) for part in parts):
            restore()
        for module, training in modes:
            module.training = training
        generators.restore()


def _buffers(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the modules' buffers, except an adapted layer's caches, which follow from its parameters."""
    holders = [module for module in modules if not isinstance(module, DoRALinear)]
    # Megatron's wrapper has a list in place of the method `buffers`.
    return [buffer for holder in holders for _, buffer in holder.named_buffers(recurse=False)]


class _Gradient:
    """A parameter's gradient, and Megatron's buffer of it."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter = parameter
        self._grad = None if parameter.grad is None else parameter.grad.detach().clone()
        main_grad: torch.Tensor | None = getattr(parameter, "main_grad", None)
        self._main_grad = SavedValues([] if main_grad is None else [main_grad])

    def restore(self) -> None:
        self._parameter.grad = self._grad
        self._main_grad.restore()


class _OptimizerState:
    """The state and the settings of a torch optimizer. State that a first step allocates is removed again."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {parameter: _copied(state) for parameter, state in optimizer.state.items()}
        self._settings = [_copied(_settings_of(group)) for group in optimizer.param_groups]

    def restore(self) -> None:
        state = self._optimizer.state
        for parameter in list(state):
            if parameter in self._state:
                _put_back(state[parameter], self._state[parameter])
            else:
                del state[parameter]
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            for name in _settings_of(group).keys() - settings.keys():
                del group[name]
            _put_back(group, settings)


class _Scaler:
    """Megatron's scaler of 16-bit losses."""

    def __init__(self, single: Any) -> None:
        scaler = getattr(single, "grad_scaler", None)
        self._attributes = {} if scaler is None else vars(scaler)
        self._before = _copied(self._attributes)

    def restore(self) -> None:
        _put_back(self._attributes, self._before)


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)
        for name, value in values.items()
    }


@torch.no_grad()
def _put_back(values: dict[str, Any], before: dict[str, Any]) -> None:
    """Restore entries; tensors in place, since other objects may hold them."""
    for name, value in before.items():
        current = values.get(name)
        if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor) and current.shape == value.shape:
            current.copy_(value)
        else:
            values[name] = value


def _same_bits(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        return False
    # As bytes, since NaN is unequal to itself and minus zero equal to zero.
    first, second = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (tensor, value))
    return torch.equal(first, second)
