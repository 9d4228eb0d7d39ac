"""One model, one optimizer: training steps, the held-out loss, and the state that a resumed run needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dora_fx.checkpoint import load_checkpoint, save_checkpoint
from dora_fx.cli.data import TokenBlocks, training_batch
from dora_fx.cli.optimizer import AdapterOptimizer, learning_rate
from dora_fx.cli.options import FinetuneOptions
from dora_fx.cli.passes import MicroBatch, Passes
from dora_fx.models import causal_mask


@dataclass(frozen=True)
class StepMetrics:
    """Of one optimizer step. `loss` is the mean over its tokens, in nats; `grad_norm` is before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


class Trainer:
    """Trains the adapters of `model` on `blocks`.

    Attributes:
        step: the number of steps done.
        passes: the model as it is called, whatever the pipeline.
        is_updating: whether the optimizer is in the middle of a step, or failed there, so that parameters and
            moments belong together no more.
    """

    def __init__(self, model: Any, blocks: TokenBlocks, options: FinetuneOptions, device: str) -> None:
        self.model = model
        self.step = 0
        self.is_updating = False
        self._blocks = blocks
        self._options = options
        self._device = device
        self._optimizer = AdapterOptimizer(model, options, device)
        self.passes = Passes(model, device)
        length = options.sequence_length
        self._mask = causal_mask(length, device)
        self._positions = torch.arange(length, device=device).expand(options.batch_size, length)

    def train_step(self) -> StepMetrics:
        """Forward, backward and update on the next sequences; raises FloatingPointError for a loss not finite.

        The data-parallel ranks share the micro-batches of the step.
        """
        options, start = self._options, time.perf_counter()
        self.model.train()
        self._optimizer.clear_gradients()
        first, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        own = [self._micro_batch(number) for number in range(first, options.gradient_accumulation, replicas)]
        total = self.passes.forward_backward(own)
        if replicas > 1:
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
            total /= replicas
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss of step {self.step + 1} is {total.item()}")
        lr = learning_rate(self.step, options)
        self.is_updating = True
        grad_norm = self._optimizer.step(lr)
        self.step += 1
        self.is_updating = False
        tokens = options.gradient_accumulation * options.batch_size * options.sequence_length
        return StepMetrics(self.step, total.item(), lr, grad_norm, tokens, time.perf_counter() - start)

    @torch.no_grad()
    def held_out_loss(self, between: Callable[[], None] = lambda: None) -> float:
        """Mean loss per token of the held-out sequences; `between` is called after each batch and may raise."""
        self.model.eval()
        size, total, count = self._options.batch_size, 0.0, 0
        for first in range(0, len(self._blocks.held_out), size):
            batch = self._blocks.held_out[first : first + size]
            # The last batch is filled up, so that every batch has the shape that was compiled.
            filled = torch.cat([batch, batch[:1].expand(size - len(batch), -1)])
            losses = self.passes.token_losses(self._of(filled))[: len(batch)]
            total += losses.double().sum().item()
            count += losses.numel()
            between()
        return total / count

    @torch.no_grad()
    def allocate_buffers(self) -> None:
        """Run one batch uncompiled.

        Megatron allocates its buffer for attention scores in the first forward pass. A graph compiled then would
        hold the allocation, and be of no use ever after.
        """
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            self.passes.token_losses(self._of(self._blocks.train[: self._options.batch_size]))

    def save(self, checkpoint: Path, *, with_optimizer: bool = True) -> None:
        """Save the state after the last complete step; every rank calls it. Raises CheckpointError."""
        extra = {"step": self.step, "text": self._blocks.fingerprint}
        save_checkpoint(self.model, checkpoint, self._optimizer.megatron if with_optimizer else None, extra=extra)

    def load(self, checkpoint: Path) -> None:
        """Go on where `save` was called, at any parallel size; every rank calls it.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
            ValueError: the text is another one, or the checkpoint is not of a training run.
        """
        extra = load_checkpoint(self.model, checkpoint, self._optimizer.megatron)
        # Earlier versions saved the states of generators, too, that dropout went on with.
        if not isinstance(extra, dict) or extra.keys() - {"generators"} != {"step", "text"}:
            raise ValueError(f"{checkpoint}: has no step and text in its extra, expected what a run saves")
        if extra["text"] != self._blocks.fingerprint:
            raise ValueError("the text is not the one the run was started with")
        self.step = extra["step"]

    def _micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch of a number within the step; its sequences and masks are the same whoever takes it."""
        options = self._options
        index = self.step * options.gradient_accumulation + number
        batch = training_batch(self._blocks.train, options.batch_size, index, options.seed)
        own = options.gradient_accumulation // parallel_state.get_data_parallel_world_size()
        return self._of(batch, index, lambda losses: losses.mean() / own)

    def _of(self, batch: Tensor, index: int = 0, loss_of: Callable[[Tensor], Tensor] = torch.mean) -> MicroBatch:
        batch = batch.to(self._device)
        seed = (self._options.seed * 1_000_003 + index) % 2**63
        return MicroBatch((batch[:, :-1], self._positions, self._mask), batch[:, 1:], seed, loss_of)
