"""DoRA adapters for Hugging Face PEFT, from any layout of ranks; `import_adapter.py` is the way back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dora_fx.attach import warn_of_other_trainables
from dora_fx.files import check_new_folder, new_folder
from dora_fx.hf.adapter_checks import check_adapters, dropout_of_all_ranks, named_base, warn_of_assumed_names
from dora_fx.hf.adapter_source import AdapterSource, adapter_source
from dora_fx.hf.counterpart import GPTCounterpart, counterpart
from dora_fx.hf.model_record import ModelRecord, model_record
from dora_fx.hf.peft_files import PeftModule, peft_tensors, warn_of_tied_output, write_peft_adapter
from dora_fx.hf.send import send_units, to_first_rank
from dora_fx.megatron import Model, chunks_of
from dora_fx.ranks import raise_on_every_rank

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
    record, target = model_record(chunks_of(model)), Path(folder)
    source = checked_source(
        record, "export_hf", base_model=base_model, vocab_size=vocab_size, model_type=model_type, folder=target
    )
    modules: dict[str, PeftModule] = {}
    for part in source.layers:
        modules |= to_first_rank(part, record.group)
    problem = None
    if record.is_writer:
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
        warn_of_tied_output(modules, tied=source.is_tied)
        logger.info("exported %d adapters to %s", len(modules), target)
    raise_on_every_rank(problem, record.group)


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
    record = model_record(chunks_of(model))
    source = checked_source(record, "iter_adapter", vocab_size=vocab_size, model_type=model_type)
    units = (peft_tensors(layer) for layer in source.layers)
    if not record.is_own:
        return send_units(units, every_rank=every_rank)
    return (item for unit in units for item in unit.items()) if every_rank or record.is_writer else iter(())


def checked_source(
    record: ModelRecord,
    writer: str,
    *,
    base_model: str | None = None,
    vocab_size: int | None = None,
    model_type: str | None = None,
    folder: Path | None = None,
) -> AdapterSource:
    """Find the Hugging Face layers of a model, check its adapters, and say in warnings what is not written or known.

    Every rank that holds a part of the model calls it.

    Args:
        record: of the model.
        writer: the name of the function that keeps the adapters, for warnings.
        base_model, vocab_size, model_type: as in `export_hf`.
        folder: that is going to be written, None for none.

    Raises:
        ValueError: on every rank, as `export_hf` says.
    """
    problem = None
    try:
        hf, base = counterpart(record, vocab_size=vocab_size, model_type=model_type), named_base(base_model)
        check_adapters(hf, base)
        if folder is not None and record.is_writer:
            check_new_folder(folder)
    except (ValueError, OSError) as error:
        problem = str(error)
    raise_on_every_rank(problem, record.group)
    source = adapter_source(record, hf, dropout_of_all_ranks(record, hf))
    warn_of_other_trainables(record.chunks, writer)
    if isinstance(hf, GPTCounterpart) and record.is_writer:
        warn_of_assumed_names(hf, base)
    return source
