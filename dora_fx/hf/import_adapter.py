"""Hugging Face PEFT DoRA adapters into a Megatron model: plan and check everything, then attach and copy."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_fx.attach import AttachPlan, DoRA, adapted_layers, attach, try_layers
from dora_fx.files import reason_of
from dora_fx.hf.counterpart import counterpart
from dora_fx.hf.import_plan import check_experts_are_alike, plan_attachments, plan_imports
from dora_fx.hf.join import JoinedAdapter
from dora_fx.hf.model_record import model_record
from dora_fx.hf.peft_reader import read_peft_adapter
from dora_fx.megatron import ModelT, chunks_of, rebuild_gradient_buffers, update_main_copies
from dora_fx.modules import DoRALinear
from dora_fx.ranks import raise_on_every_rank, world_group

logger = logging.getLogger(__name__)


def import_hf(
    model: ModelT,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    vocab_size: int | None = None,
    training: bool = True,
) -> ModelT:
    """Give a Megatron or transformers model the adapters of a Hugging Face PEFT DoRA folder, and return it.

    The function is PEFT's, exactly: layers that Megatron fuses keep a common A, or stack their ranks (q, k and v of
    rank 8 become one adapter of dim 24). What PEFT does not adapt keeps its base function; in a fused layer further
    training reaches it. A and B take the base weight's dtype, magnitudes float32 at least. Every rank calls it and
    reads the files. Everything is checked before anything is changed.

    Args:
        model: a Megatron GPTModel of a supported architecture, or a list or a tuple of its chunks, or a transformers
            model, bare or wrapped. Without adapters they are attached, with the files' dropout, as `DoRA` does it.
            With adapters these must be on the same layers and of the same dim and scaling; they keep their dropout
            and what of them is trained.
        folder: with adapter_config.json and adapter_model.safetensors.
        base_model: raise if the files name another `base_model_name_or_path`.
        vocab_size: number of tokens, where the model's output layer has more rows than the files' lm_head because
            Megatron padded it. The rows beyond keep their base function. A model of Megatron-Bridge knows it itself.
        training: of the adapters that are attached, as in `DoRA.__call__`.

    Raises:
        ValueError: on every rank, naming the file or layer: an option, a tensor or a shape without an equal here, a
            missing magnitude or layer, values that are not finite, another base, or adapters that do not fit.
    """
    record = model_record(chunks_of(model))
    problem = None
    try:
        adapter = read_peft_adapter(Path(folder), base_model)
        imports = plan_imports(counterpart(record, vocab_size=vocab_size), adapter, vocab_size)
        # A model that has adapters keeps them: they are on the layers that the files name.
        plans = None if record.sites else plan_attachments(imports, adapter.dropout)
    except (ValueError, TypeError, OSError) as error:
        problem = str(error)
    except Exception as error:
        # Of a reader, for example: the other ranks would wait for this one.
        problem = f"{folder}: cannot be read ({reason_of(error)})"
    raise_on_every_rank(problem, world_group())
    check_experts_are_alike(Path(folder), imports)
    # A pipeline stage that has nothing to attach hears of the others' layers.
    try_layers([site for _, plan in plans or () for site in plan.new])
    if plans is not None:
        _attach(record.chunks, plans, training)
    sites = {named.whole_path: named.module for _, named in adapted_layers(record.chunks)}
    for planned in imports:
        if planned.joined is not None:
            _copy(sites[planned.linear.whole_path], planned.linear.matrix, planned.joined)
    update_main_copies(parameter for site in sites.values() for parameter in site.adapter.parameters())
    logger.info("imported %d adapters from %s", sum(p.joined is not None for p in imports), folder)
    return model


def _attach(chunks: Sequence[nn.Module], plans: Sequence[tuple[DoRA, AttachPlan]], training: bool) -> None:
    for chunk in chunks:
        chunk.requires_grad_(False)
    for dora, plan in plans:
        attach(dora, plan, seed=0)
    for chunk in chunks:
        chunk.train(training)
        if not training:
            chunk.requires_grad_(False)
    rebuild_gradient_buffers(chunks)


@torch.no_grad()
def _copy(site: DoRALinear, matrix: int, joined: JoinedAdapter) -> None:
    """Copy this rank's shards of an adapter into one matrix's; every rank of its tensor-parallel group calls it."""
    adapter, factors = site.adapter, site.matrix_factors(matrix)

    def own(name: str, whole: Tensor) -> Tensor:
        return adapter.matrix_placements[name].pad_and_shard(whole, adapter.tp_rank, adapter.tp_size)

    factors.lora_a.copy_(own("linear_in.weight", joined.lora_a))
    factors.lora_b.copy_(own("linear_out.weight", joined.lora_b))
    # The norm itself, as a forward pass computes it, so that a row without an adapter is bitwise its base.
    norm = site.matrix_norm(matrix)
    magnitude = own("weight_magnitude", joined.magnitude).to(norm)
    is_adapted = own("weight_magnitude", joined.has_magnitude).to(norm.device)
    factors.magnitude.copy_(torch.where(is_adapted, magnitude, norm))
