"""DoRA adapters for Hugging Face PEFT, from any layout of ranks; `import_adapter.py` is the way back."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterator
from pathlib import Path

from torch import Tensor

from dora_fx.attach import warn_of_other_trainables
from dora_fx.files import check_new_folder, new_folder
from dora_fx.hf.adapter_source import adapter_source
from dora_fx.hf.base_names import warn_of_assumed_names
from dora_fx.hf.peft_files import PeftModule, peft_tensors, write_peft_adapter
from dora_fx.hf.send import is_speaker, send_units
from dora_fx.hf.transformers_model import speaks_for_all
from dora_fx.megatron import Model, chunks_of
from dora_fx.models import LM_HEAD
from dora_fx.ranks import gather_objects_on_first_rank, has_other_ranks, raise_on_every_rank, world_group

logger = logging.getLogger(__name__)


def export_hf(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    vocab_size: int | None = None,
    model_type: str | None = None,
) -> None:
    """Write the model's adapters as a DoRA adapter that Hugging Face PEFT loads.

    Every rank calls it. Whole tensors go to global rank 0 one layer at a time, and it writes the files: the folder
    is whole or absent. A and B keep their dtype, magnitudes stay in float32 (or float64), padding is cut off. An
    adapted output layer that is tied to the embedding is exported too, with a warning: see `warn_of_tied_output`.
    Parameters that are trained beside adapters are not written, and named in a warning.

    Args:
        model: a Megatron GPTModel of a supported architecture, or a list or a tuple of its chunks, bare or wrapped.
            Or a transformers model, of which each process has all: ranks exchange nothing, and need not all call.
        folder: a name that is free, or an empty folder.
        base_model, revision: a Hugging Face name or directory, for PEFT to find the base by. A transformers model has
            the name that it was loaded by.
        vocab_size: number of tokens of the base, where Megatron padded the output layer to more rows. Those beyond are
            cut off an adapter of it. A model of Megatron-Bridge knows it itself.
        model_type: of the base's config, whose names the layers get. A model of `build_gpt_model` knows it itself;
            others are named as Llama's, as they are of most architectures, with a warning unless the config of a
            `base_model` that is a directory says the same.

    Raises:
        ValueError: on every rank: no layer is adapted, one has no Hugging Face counterpart, adapters differ in
            dropout, one has NaN or inf, the folder exists or cannot be written, `model_type` is not the model's, or a
            `base_model` that is a directory has another vocabulary than the output layer has rows, or other layers.
    """
    chunks = chunks_of(model)
    target = Path(folder)
    source = adapter_source(chunks, base_model, vocab_size, model_type, _folder_problem_maybe(target))
    warn_of_other_trainables(chunks, "export_hf")
    modules: dict[str, PeftModule] = {}
    for part in source.layers:
        modules.update(_to_first_rank(part) if source.on_ranks else part)
    problem = None
    if speaks_for_all():
        try:
            with new_folder(target) as temporary:
                write_peft_adapter(
                    temporary,
                    modules,
                    all_paths=source.all_paths,
                    dropout=source.dropout,
                    base_model=base_model if base_model is not None else source.base_model,
                    revision=revision,
                    task_type=source.task_type,
                )
        except OSError as error:
            problem = f"{target}: {error}"
        if source.on_ranks:
            warn_of_assumed_names(chunks, model_type, base_model)
        warn_of_tied_output(modules, tied=source.is_tied)
        logger.info("exported %d adapters to %s", len(modules), target)
    raise_on_every_rank(problem, world_group() if source.on_ranks else None)


def iter_adapter(
    model: Model, *, every_rank: bool = False, vocab_size: int | None = None, model_type: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Stream the model's adapters, whole, under the names of PEFT's files and bitwise as `export_hf` writes them.

    Every rank calls it and takes the stream to its end: what is yielded has been sent. The order is that of the layers,
    whatever the layout. Beyond the model it needs memory for the adapters of one layer.

    Args:
        model, vocab_size, model_type: as in `export_hf`.
        every_rank: let every rank have the tensors; else global rank 0 alone, and the others get an empty stream.

    Raises:
        ValueError: on every rank, and at once, as `export_hf`.
        RuntimeError: while it is taken: another rank is gone, or did not come within the timeout of the process group.
    """
    chunks = chunks_of(model)
    source = adapter_source(chunks, None, vocab_size, model_type)
    warn_of_other_trainables(chunks, "iter_adapter")
    units = (peft_tensors(layer) for layer in source.layers)
    if not source.on_ranks:
        return (item for unit in units if every_rank or speaks_for_all() for item in unit.items())
    warn_of_assumed_names(chunks, model_type)
    return send_units(units, every_rank=every_rank)


def warn_of_tied_output(modules: Container[str], *, tied: bool) -> None:
    """Log what PEFT does with the adapter of an output layer that is tied to the embedding.

    It computes with it as Megatron does, but merges it into the one weight that both have. PEFT's own option
    `ensure_weight_tying` would adapt the embedding too, which is another function.
    """
    if tied and LM_HEAD in modules:
        logger.warning(
            "%s is adapted and tied to the embedding: PEFT computes with the adapter and warns about it, but its "
            "merge_and_unload would change the embedding too; keep the adapter unmerged",
            LM_HEAD,
        )


def _to_first_rank(own: dict[str, PeftModule]) -> dict[str, PeftModule]:
    group = world_group()
    if not has_other_ranks(group):
        return own
    parts = gather_objects_on_first_rank(own if is_speaker() else {}, group)
    return {path: module for part in parts for path, module in part.items()}


def _folder_problem_maybe(target: Path) -> str | None:
    try:
        if speaks_for_all():
            check_new_folder(target)
    except (ValueError, OSError) as error:
        return str(error)
    return None
