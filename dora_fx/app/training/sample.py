"""Greedy text generation, for the samples of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from dora_fx.models import causal_mask


@torch.no_grad()
def generate_greedily(
    model: Any,
    prompt: Tensor,
    num_tokens: int,
    stop_token: int | None,
    device: str,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Generate up to `num_tokens` most probable tokens after a prompt `[n]`; stop early at `stop_token`.

    Every token takes a forward pass over all tokens before it, whose length occurs once, so nothing is compiled.
    `between` is called after each token and may raise.
    """
    model.eval()
    tokens = prompt.to(device)[None]
    config = model.config
    # Replicas send each other tokens, and wait for each other's, where the ranks of one do not hold all experts.
    shares_experts = (
        config.expert_model_parallel_size * config.expert_tensor_parallel_size > config.tensor_model_parallel_size
    )
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    with torch.compiler.set_stance("force_eager"):
        for _ in range(num_tokens):
            # Sequence parallelism needs a length that it divides. Padding after the last token does not affect it.
            length = tokens.shape[1]
            filled = F.pad(tokens, (0, -length % multiple))
            positions = torch.arange(filled.shape[1], device=device)[None]
            logits = model(filled, positions, causal_mask(filled.shape[1], device))
            # Each tensor-parallel rank has the logits of its part of the vocabulary.
            last = gather_from_tensor_model_parallel_region(logits[:, length - 1])
            following = last.argmax(dim=-1, keepdim=True)
            if shares_experts:
                # The copies of a token may round otherwise on the way to its experts and back, and all stop together.
                replicas = parallel_state.get_data_parallel_group()
                dist.broadcast(following, dist.get_global_rank(replicas, 0), group=replicas)
            if stop_token is not None and following.item() == stop_token:
                break
            tokens = torch.cat([tokens, following], dim=1)
            between()
    return tokens[0, len(prompt) :].cpu()
