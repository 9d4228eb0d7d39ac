"""Megatron's AdamW on a model's adapters, and the learning-rate schedule."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from dora_fx.app.bases import DTYPES
from dora_fx.app.options import FinetuneOptions, TrainingOptions
from dora_fx.attach import config_overrides
from dora_fx.megatron import cuda_means_cpu


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule down to zero."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    if options.schedule == "linear":
        return options.lr * (1.0 - progress)
    if options.schedule == "cosine":
        return options.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.lr


class AdapterOptimizer:
    """Megatron's AdamW for a model's trainable parameters, with Megatron's gradient buffers.

    Gradients of all backward passes since `clear_gradients` add up in float32. Updates of a bfloat16 parameter go to a
    float32 main copy: bfloat16 holds three digits, and smaller updates would be lost.

    Args:
        model: a Megatron model that `DoRA` was called on; it is still called directly.
        options: dtype of the model, learning rates, settings of AdamW and the norm to clip gradients to.
        device: "cpu" or "cuda".

    Attributes:
        megatron: the optimizer, for `save_checkpoint` and `load_checkpoint`.
    """

    def __init__(self, model: Any, options: FinetuneOptions, device: str) -> None:
        self._megatron_runs = cuda_means_cpu if device == "cpu" else contextlib.nullcontext
        self._weight_decay = options.weight_decay
        settings = OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.adam_beta1,
            adam_beta2=options.adam_beta2,
            adam_eps=options.adam_eps,
            # For zero Megatron would not compute the norm; clipping to infinity changes nothing.
            clip_grad=options.max_grad_norm or math.inf,
            params_dtype=DTYPES[options.dtype],
            bf16=options.dtype == "bf16",
        )
        with self._megatron_runs():
            # Also on one rank, for its float32 gradient buffers.
            buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
            self._wrapped = DistributedDataParallel(model.config, buffers, model)
            overrides = config_overrides(
                settings,
                loraplus_lr_ratio=options.loraplus_lr_ratio,
                magnitude_lr_ratio=options.magnitude_lr_ratio,
            )
            self.megatron = get_megatron_optimizer(settings, [self._wrapped], config_overrides=overrides)

    def clear_gradients(self) -> None:
        """Clear all gradients, also those of an abandoned step."""
        self._wrapped.zero_grad_buffer()
        self.megatron.zero_grad()

    def reduce_gradients(self) -> None:
        """Reduce the gradients over the ranks."""
        with self._megatron_runs():
            finalize_model_grads([self._wrapped])

    def complete_gradients(self) -> float:
        """Reduce the gradients over the ranks; return their norm over the whole model, before clipping."""
        self.reduce_gradients()
        with self._megatron_runs():
            self.megatron.prepare_grads()
            return float(self.megatron.get_grad_norm())

    def step(self, lr: float) -> None:
        """Clip the gradients, which are complete, and update the parameters."""
        for group in self.megatron.param_groups:
            group["lr"] = lr * group["lr_mult"]
            # The multiplier is zero for magnitudes, as for all one-dimensional parameters; Megatron's scheduler, which
            # would apply it, is not used.
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        with self._megatron_runs():
            self.megatron.step()
