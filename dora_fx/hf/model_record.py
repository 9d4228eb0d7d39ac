"""A model as a caller gave it, looked through once; the record goes along as an argument, and nobody looks again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from dora_fx.megatron import NamedModule, is_transformers_model, unwrap, walk
from dora_fx.modules import DoRALinear
from dora_fx.ranks import world_group


@dataclass(frozen=True)
class ModelRecord:
    """The parts of a model, of any library, as they were when the record was made.

    Attributes:
        chunks: as they were given, bare or wrapped.
        model: the first chunk without wrappers.
        is_own: whether that is a transformers model. Its layers have Hugging Face names of their own, and each process
            holds all of it; Megatron's chunks are spread over the ranks.
        modules: every module of a chunk outside adapted layers, and these themselves, with its chunk.
        sites: the adapted layers among them.
        group: the ranks that hold parts of the model and have to call together; None for this process by itself.
        is_writer: whether this process writes what all have, as global rank 0 or by itself.
    """

    chunks: tuple[nn.Module, ...]
    model: Any
    is_own: bool
    modules: tuple[tuple[nn.Module, NamedModule], ...]
    sites: tuple[NamedModule, ...]
    group: dist.ProcessGroup | None
    is_writer: bool


def model_record(chunks: Sequence[nn.Module]) -> ModelRecord:
    """Look through the chunks of a model, which are bare or wrapped, as `chunks_of` returns them."""
    model = unwrap(chunks[0])
    is_own = is_transformers_model(model)
    modules = tuple((chunk, named) for chunk in chunks for named in walk(chunk, DoRALinear))
    return ModelRecord(
        chunks=tuple(chunks),
        model=model,
        is_own=is_own,
        modules=modules,
        sites=tuple(named for _, named in modules if isinstance(named.module, DoRALinear)),
        group=None if is_own else world_group(),
        is_writer=not dist.is_initialized() or dist.get_rank() == 0,
    )
