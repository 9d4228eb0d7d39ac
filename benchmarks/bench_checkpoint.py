"""How large is a checkpoint beside its tensors, and how long does saving take beside `torch.save` of the same?

A GPT with the layers of SmolLM2-135M (its vocabulary is not adapted and left small), adapted at rank 16. Each rank's
`torch.save` writes its own shards. Medians and ranges are printed.

    python benchmarks/bench_checkpoint.py --tp 2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

import dora_fx
from dora_fx.checkpoint.manifest import read_manifest
from dora_fx.megatron.world import megatron_world

TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def build(tp: int, dim: int) -> Any:
    # Nine heads in three groups do not divide by two; SmolLM2 is padded to twelve in four there.
    groups = math.ceil(3 / tp) * tp
    config = TransformerConfig(
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=3 * groups,
        num_query_groups=groups,
        kv_channels=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=64, position_embedding_type="rope")
    return dora_fx.DoRA(TARGETS, dim=dim, alpha=2 * dim)(model)


def seconds(function: Callable[[], object]) -> float:
    """Of a call on all ranks, from a common start to the last rank's end."""
    dist.barrier()
    start = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - start


def measure(rank: int, tp: int, dim: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", tp)
    with megatron_world(tensor_model_parallel_size=tp, store=store, global_rank=rank, world_size=tp):
        model = build(tp, dim)
        own = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        path = Path(folder) / "checkpoint"
        times: dict[str, list[float]] = {"torch.save": [], "save_checkpoint": [], "load_checkpoint": []}
        for _ in range(rounds):
            times["torch.save"].append(seconds(lambda: torch.save(own, f"{folder}/plain{rank}.pt")))
            times["save_checkpoint"].append(seconds(lambda: dora_fx.save_checkpoint(model, path)))
            times["load_checkpoint"].append(seconds(lambda: dora_fx.load_checkpoint(model, path)))
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (options.tp, options.dim, options.rounds, folder), nprocs=options.tp)
        path = Path(folder) / "checkpoint"
        tensors = read_manifest(path).tensors.values()
        whole = sum(math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize for tensor in tensors)
        on_disk = sum(file.stat().st_size for file in path.iterdir())
        times = json.loads((Path(folder) / "times.json").read_text())
    print(f"torch {torch.__version__}, CPU, tensor-parallel size {options.tp}, rank {options.dim}")
    print(f"tensors {whole:,} bytes, checkpoint {on_disk:,} bytes: {100 * (on_disk / whole - 1):+.2f} %")
    for name, values in times.items():
        print(f"{name:16} {statistics.median(values):6.3f} s  ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
