"""Train adapters with Megatron's DistributedDataParallel and optimizer, on two ranks.

    torchrun --standalone --nproc-per-node 2 examples/megatron_training.py OUT [TP]

OUT is the folder of the checkpoint. TP is the tensor-parallel size, 2 unless given; the other ranks are data-parallel.
A second run goes on where the checkpoint was saved, whatever its TP.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from tiny_gpt import DEVICE, gpt_model, megatron_on_this_device, random_batch, world

import dora_fx

STEPS, MICRO_BATCHES = 5, 2


# --8<-- [start:main]
def main(out: Path) -> None:
    dora = dora_fx.DoRA(target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], dim=8, alpha=16)
    model = dora(gpt_model())
    dora_fx.compile_model(model)

    with megatron_on_this_device():
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [ddp])
    done = dora_fx.load_checkpoint(model, out, optimizer)["step"] if out.exists() else 0

    micro_batches = [random_batch(2) for _ in range(MICRO_BATCHES)]
    for step in range(done, done + STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        total = torch.zeros((), device=DEVICE)
        for batch in micro_batches:
            loss = ddp(**batch).mean() / MICRO_BATCHES
            loss.backward()
            total += loss.detach()
        with megatron_on_this_device():
            finalize_model_grads([ddp])
            _, grad_norm, _ = optimizer.step()
        # The mean over data-parallel ranks; tensor-parallel ranks have the same loss.
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {total / dist.get_world_size():.4f}, gradient norm {grad_norm:.4f}")
    dora_fx.save_checkpoint(model, out, optimizer, extra={"step": done + STEPS})


# --8<-- [end:main]
if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    with world(tensor_parallel=int(sys.argv[2]) if len(sys.argv) == 3 else 2):
        main(Path(sys.argv[1]))
