"""Forward and backward passes of a model that may be a pipeline stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dora_fx.app.data import Sequences
from dora_fx.megatron import cuda_means_cpu


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass. Tensors such as masks `[b, 1, s, s]` are made when the pass runs.

    Attributes:
        sequences: `[b, s + 1]`.
        device: of the model.
        seed: of the dropout in the pass; each pipeline stage derives its own seed from it.
        share: weight of a learned token in the loss of a step.
    """

    sequences: Sequences
    device: str
    seed: int
    share: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the labels: b and s."""
        rows, length = self.sequences.tokens.shape
        return rows, length - 1

    def run(self, model: Any) -> Tensor:
        """Run the model; return the losses of the tokens, or the hidden states for the next stage."""
        torch.manual_seed((self.seed + _PRIME * parallel_state.get_pipeline_model_parallel_rank()) % 2**63)
        batch = self.sequences.batch(self.device)
        output: Tensor = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)
        return output

    def loss_of(self, losses: Tensor) -> Tensor:
        """Reduce the losses of the tokens `[b, s]` to this pass's share of the step's loss."""
        # Without indexing, which has a shape that depends on the data.
        return torch.where(self.sequences.loss_mask().to(losses.device), losses, 0.0).sum() * self.share


# Larger than the differences between seeds of micro-batches, so that no two passes share a seed.
_PRIME = 998_244_353_987


class Passes:
    """Runs passes through all pipeline stages with Megatron's schedule, or directly through a model without stages.

    Every rank calls every method with the same sizes; data-parallel ranks pass their own batches. Called like the
    model, it returns logits on every rank.
    """

    def __init__(self, model: Any, device: str) -> None:
        self.config = model.config
        self._model, self._device = model, device
        self._runs_on_cpu = cuda_means_cpu if device == "cpu" else contextlib.nullcontext
        self._is_pipeline = parallel_state.get_pipeline_model_parallel_world_size() > 1

    def eval(self) -> None:
        """Put the model in evaluation mode, as `Module.eval` does."""
        self._model.eval()

    def forward_backward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Accumulate the gradients of the passes; return the sum of their losses on every rank."""
        total = torch.zeros((), device=self._device)
        if not self._is_pipeline:
            for micro_batch in micro_batches:
                loss = micro_batch.loss_of(micro_batch.run(self._model))
                loss.backward()
                total += loss.detach()
            return total

        def step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro_batch = next(batches)

            def loss_of(losses: Tensor) -> tuple[Tensor, Tensor]:
                loss = micro_batch.loss_of(losses)
                # The schedule divides the loss that it propagates back by the number of passes.
                return loss * len(micro_batches), loss.detach()

            return micro_batch.run(model), loss_of

        for loss in self._scheduled(step, micro_batches, micro_batches[0].shape, forward_only=False):
            total += loss
        return self._from_last_stage(total)

    @torch.no_grad()
    def token_losses(self, micro_batch: MicroBatch) -> Tensor:
        """Compute the losses `[b, s]` of one batch, on every rank."""
        if not self._is_pipeline:
            return micro_batch.run(self._model)
        return self._forward(micro_batch.run, micro_batch.shape, torch.float32)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits `[b, s, vocab/tp]`, on every rank."""
        if not self._is_pipeline:
            logits: Tensor = self._model(tokens, positions, mask)
            return logits
        shape = (*tokens.shape, self._model.vocab_size // parallel_state.get_tensor_model_parallel_world_size())
        return self._forward(lambda model: model(tokens, positions, mask), shape, self.config.params_dtype)

    def _forward(self, run: Callable[[Any], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Run a pass; return the last stage's output, `[b, s, ...]`, on every rank."""

        def step(batches: Iterator[Any], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            return run(model), lambda output: (output.mean(), output)

        outputs = self._scheduled(step, [None], shape, forward_only=True)
        output = outputs[0].to(dtype).contiguous() if outputs else torch.empty(shape, dtype=dtype, device=self._device)
        return self._from_last_stage(output)

    def _scheduled(self, step: Any, batches: Sequence[Any], shape: tuple[int, ...], *, forward_only: bool) -> list[Any]:
        """Run the schedule; return the second values of the loss functions, which only the last stage has."""
        rows, length = shape[:2]
        with self._runs_on_cpu():
            results: list[Any] = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(batches),
                model=self._model,
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=forward_only,
            )
        return results

    def _from_last_stage(self, tensor: Tensor) -> Tensor:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=parallel_state.get_pipeline_model_parallel_group())
        return tensor
