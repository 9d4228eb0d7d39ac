"""Warn at the first step of an optimizer of adapted layers that no gradient reached.

With a checkpoint that keeps no graph, a detached output or a layer that is never called, only a part of the model is
trained, and nothing raises. B and m have gradients other than zero from the first backward pass on, A once B is not
zero, so a layer without any is one that the loss does not depend on.

A wrapper of torch's that would make different parts of a model equal is an error then: nothing has been trained.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dora_fx.attach.matching import of_all_experts
from dora_fx.megatron import check_joins_replicas, data_parallel_around, memory_of
from dora_fx.modules import DoRALinear
from dora_fx.ranks import resolve_group

logger = logging.getLogger(__name__)

_MOST_NAMES = 3
# Each model's layers by their paths, until an optimizer that has a part of them steps.
_sites_before_first_step: list[weakref.WeakValueDictionary[str, DoRALinear]] = []


def watch_first_step(sites: Mapping[str, DoRALinear]) -> None:
    """Check these layers at the first step of an optimizer that trains one; the layers of one model, by their paths."""
    if sites:
        _sites_before_first_step.append(weakref.WeakValueDictionary(sites))
        _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_check_gradients)


def _check_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
    # `args` has the optimizer first. A closure computes the gradients inside the step, after this hook.
    if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
        return
    for sites in list(_sites_before_first_step):
        alive = dict(sites)
        if not alive:
            _sites_before_first_step.remove(sites)
        elif _trains_any(optimizer, alive.values()):
            _sites_before_first_step.remove(sites)
            check_torch_wrappers(alive.values())
            _warn_of(alive)


def check_torch_wrappers(sites: Collection[DoRALinear]) -> None:
    """Raise ValueError if torch's DistributedDataParallel around layers joins ranks that hold other parts of them."""
    groups = [("tensor", resolve_group(name)) for name in {site.adapter.tp_group for site in sites} - {""}]
    of_experts = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    if of_experts is not None and any(site.adapter.experts is not None for site in sites):
        groups.append(("expert", of_experts))
    for wrapper in data_parallel_around(sites, (DistributedDataParallel,)) if groups else ():
        check_joins_replicas(wrapper, groups)


def _trains_any(optimizer: torch.optim.Optimizer, sites: Iterable[DoRALinear]) -> bool:
    """Return whether an optimizer has a parameter of the layers, a view of one, or Megatron's copy of one."""
    trained = {memory_of(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters: list[Any] = [parameter for site in sites for parameter in site.adapter.parameters()]
    copies = [getattr(parameter, "main_param", None) for parameter in parameters]
    return any(memory_of(tensor) in trained for tensor in (*parameters, *copies) if tensor is not None)


def _warn_of(sites: Mapping[str, DoRALinear]) -> None:
    with_gradient = {path for path, site in sites.items() if _has_gradient(site)}
    # A batch may have no token for an expert; one of the same layer shows that gradients reach them.
    reached = with_gradient | {of_all_experts(path) for path in with_gradient}
    untouched = [path for path in sites if not {path, of_all_experts(path)} & reached]
    if untouched:
        more = f" and {len(untouched) - _MOST_NAMES} more" if len(untouched) > _MOST_NAMES else ""
        logger.warning(
            "%s%s: found no gradient in %d of %d adapted layers at the optimizer's first step, expected one in each. "
            "They were not called, or something between them and the loss keeps no graph, such as a checkpoint whose "
            "input needs no gradient; dora_fx.check says more",
            ", ".join(untouched[:_MOST_NAMES]),
            more,
            len(untouched),
            len(sites),
        )


@torch.no_grad()
def _has_gradient(site: DoRALinear) -> bool:
    trained = [parameter for parameter in site.adapter.parameters() if parameter.requires_grad]
    gradients = [gradient for parameter in trained if (gradient := _gradient_maybe(parameter)) is not None]
    # A rank has a part of a DTensor, which may be empty.
    return not trained or any(isinstance(gradient, DTensor) or bool(gradient.any()) for gradient in gradients)


def _gradient_maybe(parameter: Any) -> torch.Tensor | None:
    """Return a parameter's gradient, which Megatron keeps in `main_grad`."""
    main_grad: torch.Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if main_grad is None else main_grad
