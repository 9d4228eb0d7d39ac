"""Estimates the memory of a run before the first step, and turns failed allocations into errors that name a cure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dora_fx.app.errors import UserError
from dora_fx.app.options import FinetuneOptions
from dora_fx.files import is_out_of_memory, reason_of
from dora_fx.models import DecoderNames
from dora_fx.modules import sites_of

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LOGIT_BYTES = 4


# Activations that a layer keeps for the backward pass, in elements per token: multiples of the hidden size, of the
# MLP's size and of the rows of linear_qkv, and the attention weights. Fitted to what autograd keeps in eager layers at
# ten sizes, to 2 %.
_PER_HIDDEN, _PER_FFN, _PER_QKV = 7.3, 7.1, 2.7
# The same of experts, for each of those that a token goes to, in place of the MLP's. Fitted at 16 sizes, to 10 %.
_PER_EXPERT_FFN, _PER_EXPERT_HIDDEN = 8.8, 2.5
# The logits and their gradient, in float32.
_LOGIT_COPIES = 2
_GRADIENT_BYTES, _MOMENT_BYTES, _MAIN_COPY_BYTES = 4, 8, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on one rank.

    Attributes:
        parameters: of the base and the adapters, with buffers; exact.
        gradients, optimizer: of the adapters; gradients include the partial sums of a step; exact.
        activations: of the micro-batches in flight, as eager layers keep them; an estimate.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = (
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("activations", self.activations),
        )
        listed = ", ".join(f"{name} {_mib(size)}" for name, size in parts)
        return f"memory of each rank: about {_mib(self.total)} ({listed})"


def estimate_memory(model: Any, options: FinetuneOptions) -> MemoryEstimate:
    """Estimate the memory that training this rank's part of an adapted GPTModel takes."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    narrow = sum(parameter.numel() for parameter in trained if parameter.dtype.itemsize < 4)
    sums = sum(site.num_partial_sums for site in sites_of(model))
    return MemoryEstimate(
        parameters=sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors),
        gradients=(count + sums) * _GRADIENT_BYTES,
        optimizer=count * _MOMENT_BYTES + narrow * _MAIN_COPY_BYTES,
        activations=_activations(model, options),
    )


def _activations(model: Any, options: FinetuneOptions) -> int:
    config, itemsize = model.config, model.config.params_dtype.itemsize
    tokens = options.batch_size * options.sequence_length
    shards = options.tp
    hidden = config.hidden_size / (shards if options.sequence_parallel else 1)
    qkv = config.kv_channels * (config.num_attention_heads + 2 * config.num_query_groups) / shards
    scores = options.sequence_length * config.num_attention_heads / shards
    # 16-bit attention keeps the softmax in float32 too.
    scores *= 1 if itemsize == 4 else 1 + 4 / itemsize
    layer = _PER_HIDDEN * hidden + _of_mlp(config, options) + _PER_QKV * qkv + scores
    # An attention with its MLP, which are two layers of a HybridModel.
    layers = DecoderNames.of(model).num_layers // options.pp
    # A stage works ahead of those behind it.
    ahead = min(options.pp, options.gradient_accumulation // options.dp)
    kept = layers * hidden * ahead + layer if options.recompute else layers * layer * ahead
    logits = _LOGIT_COPIES * _LOGIT_BYTES * model.vocab_size / shards
    return round(tokens * (kept * itemsize + logits))


def _of_mlp(config: Any, options: FinetuneOptions) -> float:
    """Return the elements per token that an MLP keeps, or experts that all get as many tokens."""
    if not config.num_moe_experts:
        return _PER_FFN * float(config.ffn_hidden_size) / options.tp
    ffn = _PER_EXPERT_FFN * config.moe_ffn_hidden_size / options.tp
    # Each rank of an expert has its whole tokens.
    hidden = _PER_EXPERT_HIDDEN * config.hidden_size * options.expert_tensor_parallel / options.tp
    return float(config.moe_router_topk * (ffn + hidden))


def memory_warning_maybe(estimate: MemoryEstimate, options: FinetuneOptions, device: str) -> str | None:
    """Return a warning if the run may not fit in memory; ranks on one CPU share its memory."""
    ranks = options.tp * options.pp * options.dp if device == "cpu" else 1
    there = memory_of(device)
    if estimate.total * ranks <= there:
        return None
    needed = f"{_mib(estimate.total)}" + f" on each of {ranks} ranks" * (ranks > 1)
    cure = "" if options.recompute else ", --recompute"
    return (
        f"warning: the run may not fit in memory: it takes about {needed}, and the {device} has {_mib(there)}; take a "
        f"smaller --batch-size with --gradient-accumulation in its place, or --sequence-length{cure}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


@contextlib.contextmanager
def fitting_in_memory(what: str, cure: str) -> Iterator[None]:
    """Turn a failed allocation in the block into a UserError with `what` and `cure` in its message."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit in memory ({reason_of(error)}); {cure}") from error


def check_batch_fits(batch_size: int, sequence_length: int, config: Any, tp: int, device: str, itemsize: int) -> None:
    """Raise UserError if a batch's logits and attention weights alone need more memory than the machine has.

    Every training step holds both at once: the float32 logits of every token, and every layer's attention weights,
    which the backward pass needs. Many systems kill a process that allocates too much without any message.

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
    """Return the largest memory that this process may use in bytes: of the GPU, or of the machine and its container."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        limit = min(limit, int(_CONTAINER_LIMIT.read_text()))
    return limit
