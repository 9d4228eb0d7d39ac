"""One model, one optimizer: training steps, the held-out loss, and the state that a resumed run needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.checkpoint import load_checkpoint, save_checkpoint
from dora_fx.cli.data import TokenBlocks, training_batch
from dora_fx.cli.optimizer import AdapterOptimizer, learning_rate
from dora_fx.cli.options import FinetuneOptions
from dora_fx.cli.step_metrics import StepMetrics
from dora_fx.models import causal_mask


class Trainer:
    """Trains the adapters of `model` on `blocks`.

    Attributes:
        step: the number of steps done.
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
        length = options.sequence_length
        self._mask = causal_mask(length, device)
        self._positions = torch.arange(length, device=device).expand(options.batch_size, length)
        # The generators as they were before the step under way, which a failed step leaves half used.
        self._generators = self._generator_states()

    def train_step(self) -> StepMetrics:
        """Forward, backward and update on the next sequences; raises FloatingPointError for a loss not finite."""
        options, start = self._options, time.perf_counter()
        self._generators = self._generator_states()
        self.model.train()
        self._optimizer.clear_gradients()
        total = torch.zeros((), device=self._device)
        for micro_batch in range(options.gradient_accumulation):
            index = self.step * options.gradient_accumulation + micro_batch
            batch = training_batch(self._blocks.train, options.batch_size, index, options.seed)
            loss = self._token_losses(batch).mean() / options.gradient_accumulation
            loss.backward()
            total += loss.detach()
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss of step {self.step + 1} is {total.item()}")
        lr = learning_rate(self.step, options)
        self.is_updating = True
        grad_norm = self._optimizer.step(lr)
        self.step += 1
        self._generators = self._generator_states()
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
            losses = self._token_losses(filled)[: len(batch)]
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
            self._token_losses(self._blocks.train[: self._options.batch_size])

    def save(self, checkpoint: Path) -> None:
        """Save the state after the last complete step; every rank calls it. Raises CheckpointError."""
        extra = {"step": self.step, "generators": self._generators, "text": self._blocks.fingerprint}
        save_checkpoint(self.model, checkpoint, self._optimizer.megatron, extra=extra)

    def load(self, checkpoint: Path) -> None:
        """Go on where `save` was called, at any tensor-parallel size; every rank calls it.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
            ValueError: the text is another one, or the checkpoint is not of a training run.
        """
        extra = load_checkpoint(self.model, checkpoint, self._optimizer.megatron)
        if not isinstance(extra, dict) or extra.keys() != {"step", "generators", "text"}:
            raise ValueError(f"{checkpoint}: has no step, generators and text in its extra, expected what a run saves")
        if extra["text"] != self._blocks.fingerprint:
            raise ValueError("the text is not the one the run was started with")
        self.step = extra["step"]
        torch.set_rng_state(extra["generators"]["cpu"])
        if "cuda" in extra["generators"] and self._device == "cuda":
            torch.cuda.set_rng_state(extra["generators"]["cuda"])
        self._generators = self._generator_states()

    def _token_losses(self, batch: Tensor) -> Tensor:
        """Cross-entropy of every token, `[b, s]`."""
        batch = batch.to(self._device)
        return self.model(batch[:, :-1], self._positions, self._mask, labels=batch[:, 1:])

    def _generator_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states
