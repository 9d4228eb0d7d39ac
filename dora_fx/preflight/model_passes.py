"""Forward and backward passes of one training step, for Megatron and transformers models, with or without stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from dora_fx.megatron import Model, chunks_of, cuda_means_cpu, unwrap

ForwardBackward = Callable[[Any, Any], Any]
Forward = Callable[[Any, Any], Any]


def is_pipeline() -> bool:
    """Return whether the model has several pipeline stages."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    return parallel_state.get_pipeline_model_parallel_world_size() > 1


def model_replicas() -> int:
    """Return the number of replicas of the whole model, context-parallel ones included."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not parallel_state.model_parallel_is_initialized():
        return ranks
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return ranks // (parallel_state.get_tensor_model_parallel_world_size() * stages)


def expert_replicas() -> int:
    """Return the number of replicas of every expert, which has tensor-parallel ranks of its own."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    ranks_of_experts = dist.get_world_size(parallel_state.get_expert_tensor_and_model_parallel_group())
    return dist.get_world_size() // (ranks_of_experts * stages)


def weight_of_loss() -> float:
    """Return the weight of this rank's loss, which differs between data-parallel ranks.

    Without different weights, gradients that are never reduced would look right if all ranks have the same batch.
    """
    if parallel_state.model_parallel_is_initialized():
        replica = parallel_state.get_data_parallel_rank()
    else:
        replica = dist.get_rank() if dist.is_initialized() else 0
    return 1.0 + replica / 8


@contextlib.contextmanager
def megatron_runs(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, let Megatron's data parallelism, schedules and optimizers run on CPU if the model is there."""
    on_cpu = any(parameter.device.type == "cpu" for chunk in chunks for parameter in chunk.parameters())
    with cuda_means_cpu() if on_cpu else contextlib.nullcontext():
        yield


def call(model: Any, batch: Any) -> Any:
    """Call a model with a batch: a mapping's entries by keyword, those of a list or a tuple by position."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def loss_of(output: Any) -> torch.Tensor:
    """Return the mean loss from the output of a model that was called with labels.

    Raises:
        TypeError: the output has no loss.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    loss = loss[0] if isinstance(loss, tuple) else loss
    if not isinstance(loss, torch.Tensor) or not loss.dtype.is_floating_point:
        raise TypeError(
            f"batch: the model returned a {type(output).__name__} without a loss, expected labels in the batch, or "
            "forward_backward=, which computes a loss"
        )
    return loss.float().mean()


def values_of(output: Any) -> torch.Tensor | None:
    """Return the part of a model's output to compare: logits, or the losses of the tokens."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) else output
    return logits.detach() if isinstance(logits, torch.Tensor) else None


def one_step(model: Model, batch: Any, scale: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
    """Run one batch forward and backward, leave complete gradients in the parameters, and return the loss.

    The gradients are those of the mean over the ranks of loss times `weight_of_loss`.

    Args:
        model: a model or its chunks.
        batch: for one forward pass.
        scale: scales the loss, which an optimizer for float16 needs.

    Returns:
        This rank's loss; None on pipeline stages without a loss.
    """
    chunks = chunks_of(model)
    weight = weight_of_loss()
    if is_pipeline():
        loss = _through_stages(chunks, batch, weight)
    else:
        if len(chunks) > 1:
            raise ValueError(f"model: found {len(chunks)} chunks on one pipeline stage, expected one")
        own_loss = loss_of(call(chunks[0], batch))
        with megatron_runs(chunks) if _overlaps(chunks) else contextlib.nullcontext():
            scale(own_loss * weight).backward()
        loss = own_loss.item()
    complete_gradients(chunks)
    return loss


def complete_gradients(chunks: Sequence[nn.Module]) -> None:
    """Let Megatron's data-parallel wrappers reduce the gradients, unless a pipeline schedule has done so."""
    wrapped = [chunk for chunk in chunks if hasattr(chunk, "finish_grad_sync")]
    config: Any = getattr(unwrap(chunks[0]), "config", None)
    is_done = is_pipeline() and getattr(config, "finalize_model_grads_func", None) is not None
    if wrapped and not is_done:
        with megatron_runs(chunks):
            finalize_model_grads(wrapped)


def output_of(model: Model, batch: Any, forward: Forward | None) -> torch.Tensor | None:
    """Compute the model's output without gradients; None on pipeline stages before the last."""
    with torch.no_grad():
        if forward is not None:
            return values_of(forward(model, batch))
        chunks = chunks_of(model)
        if not is_pipeline():
            return values_of(call(chunks[0], batch))
        outputs: list[torch.Tensor] = []

        def keep(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outputs.append(output)
            return output.float().mean(), output

        _run_schedule(chunks, batch, keep, forward_only=True)
        return outputs[0] if outputs else None


def _through_stages(chunks: Sequence[nn.Module], batch: Any, weight: float) -> float | None:
    losses: list[float] = []

    def weighted(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(output)
        losses.append(loss.item())
        return loss * weight, loss.detach()

    _run_schedule(chunks, batch, weighted, forward_only=False)
    return sum(losses) / len(losses) if losses else None


def _run_schedule(chunks: Sequence[nn.Module], batch: Any, loss_function: Any, *, forward_only: bool) -> None:
    """Run Megatron's pipeline schedule with one copy of the micro-batch per stage."""
    rows, length = _token_shape(batch)
    # Megatron's interleaved schedule needs a multiple of the number of stages.
    number = parallel_state.get_pipeline_model_parallel_world_size()

    def step(batches: Iterator[Any], model: Any) -> tuple[Any, Any]:
        return call(model, next(batches)), loss_function

    batches = [iter([batch] * number) for _ in chunks]
    with megatron_runs(chunks):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=number,
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )


def _token_shape(batch: Any) -> tuple[int, int]:
    """Return b and s of a batch of tokens."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor) and value.dim() == 2]
    if not shapes:
        raise ValueError("batch: found no tensor of tokens [b, s], expected one for the schedule of pipeline stages")
    return shapes[0][0], shapes[0][1]


def _overlaps(chunks: Sequence[nn.Module]) -> bool:
    return any(getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False) for chunk in chunks)
