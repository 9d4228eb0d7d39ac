"""Sizes that no memory holds: found before the first step where they can be, and named where an allocation fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dora_fx.cli.errors import UserError
from dora_fx.files.regular_file import reason_of
from dora_fx.models.reading import is_out_of_memory

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LOGIT_BYTES = 4


@contextlib.contextmanager
def fitting_in_memory(what: str, cure: str) -> Iterator[None]:
    """Turn a failed allocation in the block into a UserError; `what` and `cure` are the user's words for it."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit in memory ({reason_of(error)}); {cure}") from error


def check_batch_fits(batch_size: int, sequence_length: int, config: Any, tp: int, device: str, itemsize: int) -> None:
    """Raise UserError if a batch's logits and attention weights alone need more memory than the machine has.

    Both are there at once in any training step: the float32 logits of every token, and every layer's attention
    weights, which the backward pass needs. A process that asks for so much is killed without a word on many systems.

    Args:
        batch_size, sequence_length: of one forward pass.
        config: of the base, transformers'.
        tp: tensor-parallel size, over which heads and vocabulary are sharded; ranks on one CPU share its memory.
        device: "cpu" or "cuda".
        itemsize: bytes of one element of the model's dtype.
    """
    attention = config.num_hidden_layers * config.num_attention_heads * sequence_length * itemsize
    needed = batch_size * sequence_length * (config.vocab_size * _LOGIT_BYTES + attention)
    needed = needed if device == "cpu" else needed // tp
    there = memory_of(device)
    if needed > there:
        raise UserError(
            f"--batch-size: found {batch_size} sequences of {sequence_length} tokens, whose logits and attention "
            f"weights alone take {needed >> 20:,} MiB; expected at most the {there >> 20:,} MiB of memory; "
            "take fewer, with --gradient-accumulation in their place, or a smaller --sequence-length"
        )


def memory_of(device: str) -> int:
    """Bytes of memory that this process may have at most: of the GPU, or of the machine and its container."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        limit = min(limit, int(_CONTAINER_LIMIT.read_text()))
    return limit
