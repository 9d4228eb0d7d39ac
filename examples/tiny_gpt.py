"""What the Megatron examples stand on: a world of the ranks that torchrun started, a small GPT, and random tokens.

Your own launcher, model and data take the place of this file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.megatron.world import megatron_world
from dora_fx.models import causal_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, LENGTH = 64, 16

# Megatron's data parallelism, optimizer and pipeline schedule name CUDA devices in their code, so on a CPU they run
# inside of this. It does nothing on CUDA.
megatron_on_this_device = cuda_means_cpu if DEVICE == "cpu" else contextlib.nullcontext


@contextlib.contextmanager
def world(tensor_parallel: int, pipeline_parallel: int = 1) -> Iterator[None]:
    """Join the processes that torchrun started, with gloo or NCCL; data parallelism takes the ranks that are left."""
    store, global_rank, world_size = next(dist.rendezvous("env://"))
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with megatron_world(
        DEVICE,
        store=store,
        global_rank=global_rank,
        world_size=world_size,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
    ):
        yield


def gpt_model(num_layers: int = 2) -> Any:
    """This rank's part of a GPT in float32, with random weights that are the same at every tensor-parallel size."""
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return model.to(DEVICE)


def random_batch(size: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of a GPTModel, another batch on each data-parallel rank: `input_ids` `[b, s]` and the rest."""
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=generator).to(DEVICE)
    return {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(LENGTH, device=DEVICE).expand(size, LENGTH),
        "attention_mask": causal_mask(LENGTH, DEVICE),
        "labels": tokens[:, 1:],
    }
