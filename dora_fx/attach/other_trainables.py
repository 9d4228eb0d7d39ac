"""Warn of parameters that a model trains beside its adapters, where only the adapters are saved."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from dora_fx.attach.matching import adapted_layers
from dora_fx.megatron import walk

logger = logging.getLogger(__name__)

_NUM_LISTED = 3
# The warnings about a model so far. Some trainings save adapters at every step.
_warnings: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def other_trainables(chunks: Sequence[nn.Module]) -> list[str]:
    """Return the names in the whole model of this rank's parameters that require a gradient and are no adapter's."""
    sites = [named.module for _, named in adapted_layers(chunks)]
    seen = {parameter for site in sites for parameter in site.adapter.parameters()}
    found = []
    for chunk in chunks:
        for named in walk(chunk):
            for name, parameter in named.module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    found.append(f"{named.whole_path}.{name}".replace(".to_wrap.", ".").lstrip("."))
    return found


def warn_of_other_trainables(chunks: Sequence[nn.Module], writer: str) -> None:
    """Log once which trained parameters a function does not save; each pipeline stage's first rank names its own.

    Args:
        chunks: the model's, bare or wrapped.
        writer: the name of the function, which saves adapters alone.
    """
    found = other_trainables(chunks) if _is_first_replica() else []
    if not found:
        return
    listed = ", ".join(found[:_NUM_LISTED])
    more = f" and {len(found) - _NUM_LISTED} more" if len(found) > _NUM_LISTED else ""
    message = (
        f"{writer} keeps adapters alone: found {len(found)} other trainable parameters ({listed}{more}), of which "
        "nothing is written; freeze them, or save them by themselves"
    )
    earlier = _warnings.setdefault(chunks[0], set())
    if message not in earlier:
        earlier.add(message)
        logger.warning("%s", message)


def _is_first_replica() -> bool:
    """Return whether no rank before this one has the same part of the model."""
    if parallel_state.model_parallel_is_initialized():
        in_stage = parallel_state.get_tensor_model_parallel_rank()
        return in_stage == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return not dist.is_initialized() or dist.get_rank() == 0
