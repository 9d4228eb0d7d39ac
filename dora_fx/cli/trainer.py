"""One model, one optimizer: training steps, the held-out loss, and the state that a resumed run needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.checkpoint import load_checkpoint, save_checkpoint
from dora_fx.cli.optimizer import AdapterOptimizer, learning_rate
from dora_fx.cli.options import FinetuneOptions
from dora_fx.data.sequences import Batch, TrainingSequences, training_batch


@dataclass(frozen=True)
class StepMetrics:
    """Of one optimizer step.

    `loss` is the mean over the tokens that are learned, in nats; `grad_norm` is before clipping; `tokens` are all but
    padding.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


class Trainer:
    """Trains the adapters of `model` on `sequences`.

    Attributes:
        step: the number of steps done.
        is_updating: whether the optimizer is in the middle of a step, or failed there, so that parameters and
            moments belong together no more.
    """

    def __init__(self, model: Any, sequences: TrainingSequences, options: FinetuneOptions, device: str) -> None:
        self.model = model
        self.step = 0
        self.is_updating = False
        self._sequences = sequences
        self._options = options
        self._device = device
        self._optimizer = AdapterOptimizer(model, options, device)
        # The generators as they were before the step under way, which a failed step leaves half used.
        self._generators = self._generator_states()

    def train_step(self) -> StepMetrics:
        """Forward, backward and update on the next sequences; raises FloatingPointError for a loss not finite."""
        options, start = self._options, time.perf_counter()
        self._generators = self._generator_states()
        self.model.train()
        self._optimizer.clear_gradients()
        total = torch.zeros((), device=self._device)
        batches = self._batches_of_step()
        # Batches have more or fewer tokens that are learned, and each token counts alike.
        num_targets = sum(batch.num_targets for batch in batches)
        for batch in batches:
            loss = self._loss(batch) / num_targets
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
        tokens = sum(batch.num_tokens for batch in batches)
        return StepMetrics(self.step, total.item(), lr, grad_norm, tokens, time.perf_counter() - start)

    @torch.no_grad()
    def held_out_loss(self, between: Callable[[], None] = lambda: None) -> float:
        """Mean loss of the held-out tokens that are learned; `between` is called after each batch and may raise."""
        self.model.eval()
        size, total, count = self._options.batch_size, 0.0, 0
        held_out = self._sequences.held_out
        for first in range(0, len(held_out), size):
            # The last batch is filled up, so that every batch has the shape that was compiled.
            rows = torch.arange(first, first + size)
            batch = held_out[torch.where(rows < len(held_out), rows, first)].batch(self._device)
            is_counted = batch.loss_mask & (rows < len(held_out)).to(self._device)[:, None]
            total += self._token_losses(batch)[is_counted].double().sum().item()
            count += int(is_counted.sum())
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
            self._token_losses(self._sequences.train[: self._options.batch_size].batch(self._device))

    def save(self, checkpoint: Path) -> None:
        """Save the state after the last complete step; every rank calls it. Raises CheckpointError."""
        extra = {"step": self.step, "generators": self._generators, "text": self._sequences.fingerprint}
        save_checkpoint(self.model, checkpoint, self._optimizer.megatron, extra=extra)

    def load(self, checkpoint: Path) -> None:
        """Go on where `save` was called, at any tensor-parallel size; every rank calls it.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
            ValueError: the data are others, or the checkpoint is not of a training run.
        """
        extra = load_checkpoint(self.model, checkpoint, self._optimizer.megatron)
        if not isinstance(extra, dict) or extra.keys() != {"step", "generators", "text"}:
            raise ValueError(f"{checkpoint}: has no step, generators and text in its extra, expected what a run saves")
        if extra["text"] != self._sequences.fingerprint:
            raise ValueError("the text is not the one the run was started with")
        self.step = extra["step"]
        torch.set_rng_state(extra["generators"]["cpu"])
        if "cuda" in extra["generators"] and self._device == "cuda":
            torch.cuda.set_rng_state(extra["generators"]["cuda"])
        self._generators = self._generator_states()

    def _batches_of_step(self) -> list[Batch]:
        """The batches of the next step, a forward pass each."""
        options = self._options
        first = self.step * options.gradient_accumulation
        indices = range(first, first + options.gradient_accumulation)
        rows = (training_batch(self._sequences.train, options.batch_size, index, options.seed) for index in indices)
        return [sequences.batch(self._device) for sequences in rows]

    def _loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy of the tokens that are learned."""
        # Not by indexing, whose shape would depend on the data.
        return torch.where(batch.loss_mask, self._token_losses(batch), 0.0).sum()

    def _token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of every token, `[b, s]`."""
        return self.model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)

    def _generator_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states
