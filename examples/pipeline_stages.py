"""Train adapters on two pipeline stages with Megatron's schedule.

    torchrun --standalone --nproc-per-node 2 examples/pipeline_stages.py

Each rank holds half of the layers. The schedule sends hidden states forward and their gradients back, and the last
stage has the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from tiny_gpt import LENGTH, gpt_model, megatron_on_this_device, random_batch, world

import dora_fx

STEPS, MICRO_BATCHES, BATCH = 5, 4, 2


# --8<-- [start:main]
def forward_step(batches: Iterator[dict[str, Any]], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Megatron's forward step: a stage's output for the next micro-batch, and what the last stage makes of it."""
    output = model(**next(batches))
    return output, lambda losses: (losses.mean(), losses.detach().mean())


def main() -> None:
    dora = dora_fx.DoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=8, alpha=16)
    model = dora(gpt_model(num_layers=2))
    dora_fx.compile_model(model)

    with megatron_on_this_device():
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [ddp])

    batches = [random_batch(BATCH) for _ in range(MICRO_BATCHES)]
    for step in range(STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        with megatron_on_this_device():
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=ddp,
                num_microbatches=MICRO_BATCHES,
                seq_length=LENGTH,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            finalize_model_grads([ddp])
            optimizer.step()
        if parallel_state.is_pipeline_last_stage():
            print(f"step {step + 1}: loss {sum(losses).item() / MICRO_BATCHES:.4f}")


# --8<-- [end:main]
if __name__ == "__main__":
    with world(tensor_parallel=1, pipeline_parallel=2):
        main()
