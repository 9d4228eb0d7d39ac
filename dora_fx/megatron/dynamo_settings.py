"""Set Dynamo up to capture Megatron-Core's layers without graph breaks.

The settings hold for the whole process, so they are made only when something is compiled: by the import of
`dora_fx.backend`, which torch imports for `backend="dora_fx"`, and for another backend when Dynamo traces the first
adapted layer.
"""

from __future__ import annotations

import _warnings
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch._dynamo import config
from torch.utils.checkpoint import checkpoint


def capture_megatron_whole() -> None:
    """Let Dynamo trace Megatron's layers without a graph break, and alike on every rank.

    Calls of `warnings.warn` are skipped: Megatron warns about a missing process-group argument inside
    RowParallelLinear's forward, on global rank 0 alone. Each such warning breaks the graph, so rank 0 would compile
    other graphs than its peers.

    A module may set attributes of itself inside `torch.utils.checkpoint`, and does so once, in the forward pass:
    TransformerLayer keeps its activation-offloading managers that way (megatron-core 0.19).

    Megatron's checkpoint is traced as torch's, which Dynamo has an operator for: it reads the states of generators,
    and its backward pass runs another one.
    """
    ignored = config.ignore_logging_functions if hasattr(config, "ignore_logging_functions") else None
    if ignored is None:
        ignored = config.ignore_logger_methods
    ignored.update({warnings.warn, _warnings.warn})
    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    _trace_checkpoints_of_megatron()


@functools.cache
def _trace_checkpoints_of_megatron() -> None:
    """Register the replacement, which Dynamo takes once in a process and keeps when it is reset."""

    @torch.compiler.substitute_in_graph(random.checkpoint)
    def traced(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        if distribute_saved_activations:
            # Only Megatron's own keeps a part of its input on each rank.
            return random.CheckpointFunction.apply(function, distribute_saved_activations, *args)
        return checkpoint(function, *args, use_reentrant=False)


def allow_many_graphs() -> None:
    """Raise Dynamo's limit of graphs per function, by default 8, to what a model with adapters needs.

    Layers that are compiled one by one are calls of the same function. It has a graph for each kind of layer and rank
    of the low-rank product, and for each way of running them, such as training and evaluation.
    """
    config.recompile_limit = max(config.recompile_limit, 64)
