"""Training steps, the held-out loss, the preflight, and saving and loading of the training state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

import dora_fx
from dora_fx import CheckReport
from dora_fx.app.data import Sequences, TrainingSequences, training_batch
from dora_fx.app.options import FinetuneOptions
from dora_fx.app.runs import StepMetrics
from dora_fx.app.training.adapter_optimizer import AdapterOptimizer, learning_rate
from dora_fx.app.training.micro_batches import MicroBatch, Passes
from dora_fx.app.training.not_finite import problem_of_step_maybe
from dora_fx.checkpoint import load_checkpoint, save_checkpoint


class Trainer:
    """Trains the adapters of `model` on `sequences`.

    Attributes:
        step: number of finished steps.
        last_update: the last step that made an update since this object was made; None before.
        passes: runs the model, with or without pipeline stages.
        is_updating: whether the optimizer is in the middle of a step, or failed there; then parameters and moments may
            be inconsistent.
    """

    def __init__(self, model: Any, sequences: TrainingSequences, options: FinetuneOptions, device: str) -> None:
        self.model = model
        self.step = 0
        self.last_update: int | None = None
        self.is_updating = False
        self._sequences = sequences
        self._options = options
        self._device = device
        self._optimizer = AdapterOptimizer(model, options, device)
        self.passes = Passes(model, device)

    def train_step(self) -> StepMetrics:
        """Run forward, backward and update on the next sequences.

        The data-parallel ranks share the micro-batches of the step. If the loss or the gradients are not finite,
        parameters and moments stay unchanged on every rank; the step counts, so that the next one takes other
        sequences.
        """
        options, start = self._options, time.perf_counter()
        self.model.train()
        self._optimizer.clear_gradients()
        first, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        batches = [self._sequences_of(index) for index in self._indices_of_step()]
        # Batches have different numbers of learned tokens, and every token has the same weight. Gradients and losses
        # are averaged over the replicas, hence the factor.
        share = replicas / sum(int(batch.loss_mask().sum()) for batch in batches)
        own = list(zip(self._indices_of_step(), batches, strict=True))[first::replicas]
        total = self.passes.forward_backward([self._micro_batch(batch, index, share) for index, batch in own])
        if replicas > 1:
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
            total /= replicas
        loss, grad_norm, lr = total.item(), self._optimizer.complete_gradients(), learning_rate(self.step, options)
        problem = problem_of_step_maybe(self.model, loss, grad_norm, lambda: self._run_again(own))
        # A signal in the middle of the update would leave parameters and moments of different steps.
        self.is_updating = True
        if problem is None:
            self._optimizer.step(lr)
            self.last_update = self.step + 1
        self.step += 1
        self.is_updating = False
        tokens = sum(batch.num_tokens for batch in batches)
        return StepMetrics(self.step, loss, lr, grad_norm, tokens, time.perf_counter() - start, problem)

    def go_back_to_last_update(self) -> None:
        """Set the step count back to the last update; the steps since then changed nothing."""
        assert self.last_update is not None
        self.step = self.last_update

    def _run_again(self, batches: Sequence[tuple[int, Sequences]]) -> None:
        """Run the forward passes of a step again, with the same dropout masks."""
        for index, batch in batches:
            self.passes.token_losses(self._micro_batch(batch, index))

    @torch.no_grad()
    def held_out(self, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Measure the held-out data; `between` is called after each batch and may raise.

        Returns:
            `held_out_loss`, the mean loss of the tokens that are learned; of samples also `held_out_certain`, how many
            of them greedy decoding is certain to answer word for word.
        """
        self.model.eval()
        size, total, count, certain = self._options.batch_size, 0.0, 0, 0
        held_out = self._sequences.held_out
        for first in range(0, len(held_out), size):
            # The last batch is padded with rows that do not count, so that every batch has the compiled shape.
            rows = torch.arange(first, first + size)
            is_row = rows < len(held_out)
            batch = held_out[torch.where(is_row, rows, first)]
            is_counted = (batch.loss_mask() & is_row[:, None]).to(self._device)
            losses = self.passes.token_losses(self._micro_batch(batch))
            total += losses[is_counted].double().sum().item()
            count += int(is_counted.sum())
            certain += batch[is_row].num_certain(losses.cpu()[is_row])
            between()
        return {"held_out_loss": total / count, **({"held_out_certain": certain} if self.num_held_out else {})}

    @property
    def num_held_out(self) -> int:
        """Samples that are held out; 0 of a text."""
        return self._sequences.held_out.num_samples()

    @torch.no_grad()
    def allocate_buffers(self) -> None:
        """Run one batch without compiling.

        Megatron allocates its buffer for attention scores in the first forward pass. A graph that is compiled in that
        pass would contain the allocation and be recompiled in the next one.
        """
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            self.passes.token_losses(self._micro_batch(self._sequences.train[: self._options.batch_size]))

    def check(self) -> CheckReport:
        """Run the preflight on the first forward pass of each data-parallel rank; every rank calls it."""
        self.model.train()
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        batches = [self._sequences_of(index) for index in range(replicas)]
        share = replicas / sum(int(batch.loss_mask().sum()) for batch in batches)
        micro_batch = self._micro_batch(batches[replica], replica, share)

        def forward_backward(model: Any, batch: MicroBatch) -> float:
            loss = self.passes.forward_backward([batch]).item()
            self._optimizer.reduce_gradients()
            return loss

        return dora_fx.check(
            self.model,
            micro_batch,
            self._optimizer.megatron,
            forward_backward=forward_backward,
            forward=lambda model, batch: self.passes.token_losses(batch),
            raises=False,
        )

    def save(self, checkpoint: Path, *, with_optimizer: bool = True) -> None:
        """Save the state after the last complete step; every rank calls it. It may raise CheckpointError."""
        extra = {"step": self.step, "text": self._sequences.fingerprint}
        save_checkpoint(self.model, checkpoint, self._optimizer.megatron if with_optimizer else None, extra=extra)

    def load(self, checkpoint: Path) -> None:
        """Load the state that `save` saved, at any parallel size; every rank calls it.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
            ValueError: the data is not that of the run, or the checkpoint is not that of a training run.
        """
        extra = load_checkpoint(self.model, checkpoint, self._optimizer.megatron)
        # Earlier versions also saved the states of generators, which dropout no longer needs.
        if not isinstance(extra, dict) or extra.keys() - {"generators"} != {"step", "text"}:
            raise ValueError(f"{checkpoint}: found no step and text in its extra, expected the checkpoint of a run")
        if extra["text"] != self._sequences.fingerprint:
            raise ValueError("the text is not the one that the run was started with")
        self.step = extra["step"]

    def _indices_of_step(self) -> range:
        """Return the indices, within the whole run, of the next step's micro-batches."""
        first = self.step * self._options.gradient_accumulation
        return range(first, first + self._options.gradient_accumulation)

    def _sequences_of(self, index: int) -> Sequences:
        options = self._options
        return training_batch(self._sequences.train, options.batch_size, index, options.seed)

    def _micro_batch(self, sequences: Sequences, index: int = 0, share: float = 1.0) -> MicroBatch:
        """Make a micro-batch by its index in the run; its dropout masks are the same on any rank."""
        seed = (self._options.seed * 1_000_003 + index) % 2**63
        return MicroBatch(sequences, self._device, seed, share)
