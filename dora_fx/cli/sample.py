"""Greedy text generation, for a look at what the model writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    """Up to `num_tokens` most probable tokens after a prompt `[n]`; it ends early at `stop_token`.

    Every token is a forward pass over all before it, of a length that comes once, so nothing is compiled for it.
    `between` is called after each token and may raise.
    """
    model.eval()
    tokens = prompt.to(device)[None]
    with torch.compiler.set_stance("force_eager"):
        for _ in range(num_tokens):
            length = tokens.shape[1]
            positions = torch.arange(length, device=device)[None]
            logits = model(tokens, positions, causal_mask(length, device))
            following = logits[:, -1].argmax(dim=-1, keepdim=True)
            if stop_token is not None and following.item() == stop_token:
                break
            tokens = torch.cat([tokens, following], dim=1)
            between()
    return tokens[0, len(prompt) :].cpu()
