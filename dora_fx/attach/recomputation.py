"""Let adapters train in layers that are recomputed in the backward pass, though everything before them is frozen.

A reentrant checkpoint, of Megatron or torch, is an autograd function around layers that run without gradients. Autograd
leaves it out of the graph unless one of its inputs needs a gradient, and the output of a frozen embedding needs none.
The adapters inside would then get no gradient, without an error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from dora_fx.megatron import Arguments, need_gradient, with_gradient
from dora_fx.modules import DoRALinear

# Megatron's modules that checkpoint layers which they hold, or whose layers checkpoint parts of themselves. Known by
# their names, since no version of Megatron has all of them.
_STACKS = {"TransformerBlock", "MambaStack", "HybridStack", "MultiTokenPredictionBlock"}


def train_through_recomputation(chunk: nn.Module) -> None:
    """Make inputs require a gradient in every call of a module of a chunk that recomputes adapted layers.

    That costs one layer's gradient of its input. Calls that recompute nothing, or that run without gradients, are left
    alone; each call reads the module's settings, since these may change. Checkpoints that are put around modules later
    are noticed where they are around Megatron's layers.

    Args:
        chunk: bare or wrapped, with adapters. Further calls change nothing.
    """
    for module in chunk.modules():
        hook = _hook_maybe(module)
        if hook is None or hook in module._forward_pre_hooks.values():
            continue
        if any(isinstance(part, DoRALinear) for part in module.modules()):
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_maybe(module: nn.Module) -> Any:
    if any(cls.__name__ in _STACKS and cls.__module__.startswith("megatron.core.") for cls in type(module).__mro__):
        return before_stack
    if isinstance(module, CheckpointWrapper):
        return before_wrapper
    # Every layer of transformers that can be recomputed has an attribute of this name.
    return before_transformers_layer if hasattr(type(module), "gradient_checkpointing") else None


def before_stack(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Forward pre-hook of the modules of `_STACKS`."""
    if not torch.is_grad_enabled() or not _recomputes(stack):
        return None
    if not getattr(stack, "pre_process", True):
        # A later pipeline stage computes with this attribute, and not with its argument.
        if isinstance(stack.input_tensor, torch.Tensor) and not stack.input_tensor.requires_grad:
            stack.input_tensor = need_gradient(stack.input_tensor)
        return None
    return with_gradient(args, kwargs)


def _recomputes(stack: Any) -> bool:
    config = stack.config
    if config.recompute_granularity == "full":
        return bool(stack.training)
    if config.recompute_granularity == "selective":
        # Nothing in core attention is adapted.
        return any(name != "core_attn" for name in config.recompute_modules or ())
    return any(isinstance(layer, CheckpointWrapper) and _is_reentrant(layer.checkpoint_fn) for layer in stack.layers)


def before_wrapper(wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Forward pre-hook of torch's wrapper that checkpoints a module."""
    if torch.is_grad_enabled() and _is_reentrant(wrapper.checkpoint_fn):
        return with_gradient(args, kwargs)
    return None


def before_transformers_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Forward pre-hook of a layer of transformers, which checkpoints its `forward` (transformers 5.24)."""
    recomputes = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    if recomputes and _is_reentrant(layer._gradient_checkpointing_func):
        return with_gradient(args, kwargs)
    return None


def _is_reentrant(checkpoint: Any) -> bool:
    """Return whether a checkpoint may be reentrant; True for functions other than torch's, of which it is not known."""
    return not (isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant") is False)
