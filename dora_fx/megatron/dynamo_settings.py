"""The Dynamo settings that Megatron-Core needs to be captured as a whole.

They hold for the whole process, so nothing sets them before something is compiled: importing `dora_fx.backend` does,
which torch does for `backend="dora_fx"`, and another compiler's Dynamo when it comes to an adapted layer.
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
    """Let one function have as many graphs as a model has kinds of adapted layers, times the ways of running them.

    A graph is of one rank of the low-rank product, and Dynamo gives up at 8 graphs of a function by default. Layers
    compiled one by one are all the same function.
    """
    config.recompile_limit = max(config.recompile_limit, 64)
