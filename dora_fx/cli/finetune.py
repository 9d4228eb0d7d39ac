"""`dora-fx finetune`: from a base model and a text to a trained adapter in a run folder."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dora_fx
from dora_fx import DoRA
from dora_fx.attach.report import DoRAReport
from dora_fx.cli.base_model import DTYPES, build_base_model, chosen_device, load_checkpoint, resolve_base
from dora_fx.cli.data import demo_documents, read_documents
from dora_fx.cli.errors import UserError
from dora_fx.cli.memory import fitting_in_memory
from dora_fx.cli.options import FinetuneOptions, check_resumable, options_from, saved_options
from dora_fx.cli.progress import Display
from dora_fx.cli.ranks import Ranks
from dora_fx.cli.run_folder import RunFolder
from dora_fx.cli.stop_signals import StopSignals
from dora_fx.cli.tokens import BaseTokenizer
from dora_fx.cli.trainer import Trainer
from dora_fx.cli.training_run import TrainingRun
from dora_fx.cli.training_text import training_text

_SMALLER_ADAPTER = "take a smaller --dim, or fewer --target-modules"


def run(parsed: dict[str, Any]) -> int:
    """Check everything that can be checked without the model, then load, train and write; return the exit code.

    Raises:
        UserError: for options, files and models that the command cannot work with.
        Interrupted: by a signal while there is nothing to save.
    """
    options = options_from(parsed)
    ranks = Ranks.from_environment()
    _check_world_size(options, ranks)
    folder = _run_folder(options)
    dora = _dora(options)
    documents = _documents(options)
    device = chosen_device(options.device)
    display = Display(quiet=not ranks.is_main)
    stop = StopSignals(agree=ranks.largest)
    with stop.installed(), ranks.world(device, options.seed, options.tp):
        path = _resolve_base(options, display, ranks)
        with display.phase(f"loading {path.name}"):
            checkpoint = load_checkpoint(path, DTYPES[options.dtype])
        tokenizer = BaseTokenizer(path, checkpoint.tokenizer, checkpoint.config.vocab_size)
        text = training_text(options, documents, tokenizer, checkpoint.config, device)
        blocks = text.blocks
        ranks.check_agreement(saved_options(options) | {"text": blocks.fingerprint, **_versions()})
        with display.phase("building the Megatron model"):
            model = build_base_model(checkpoint, options, device)
        report = _adapt(dora, model)
        if options.compile != "none":
            dora_fx.compile_model(model, options.compile, inner_compiler=options.inner_compiler)
        display.say(
            f"text: {blocks.num_tokens:,} tokens; {len(blocks.train)} training sequences and "
            f"{len(blocks.held_out)} held-out ones of {options.sequence_length}; "
            f"{options.dtype} on {_place(options, device)}"
        )
        if unknown := tokenizer.beyond_the_model():
            display.say(f"tokens of the tokenizer that the model does not have: {unknown}; the text has none of them")
        display.say(_summary(report))
        with fitting_in_memory("the optimizer", _SMALLER_ADAPTER):
            trainer = Trainer(model, blocks, options, device)
        if options.resume is None:
            ranks.from_main(folder.create, saved_options(options), str(report))
        return TrainingRun(options, ranks, folder, display, stop, trainer, tokenizer, text.prompt, device).run()


def _check_world_size(options: FinetuneOptions, ranks: Ranks) -> None:
    if options.tp == 1 and ranks.world_size > 1:
        raise UserError(
            f"found {ranks.world_size} processes and no --tp; give --tp {ranks.world_size} to shard the model over "
            "them, or start the command without torchrun"
        )
    if ranks.world_size != options.tp:
        raise UserError(
            f"--tp {options.tp}: found {ranks.world_size} processes, expected as many as the tensor-parallel size; "
            f"start it with: torchrun --standalone --nproc-per-node {options.tp} --no-python -- dora-fx finetune ..."
        )


def _versions() -> dict[str, str]:
    import megatron.core

    return {"dora_fx": dora_fx.__version__, "torch": torch.__version__, "megatron-core": megatron.core.__version__}


def _place(options: FinetuneOptions, device: str) -> str:
    if options.tp == 1:
        return device
    return f"{device}, {options.tp} tensor-parallel ranks{' with sequence parallelism' * options.sequence_parallel}"


def _run_folder(options: FinetuneOptions) -> RunFolder:
    """The folder to create, checked not to exist, or the folder to resume, checked against the options."""
    if options.resume is not None:
        folder = RunFolder(options.resume)
        check_resumable(options, folder.saved_config())
        folder.check_rows()
        return folder
    name = options.data.stem if options.data is not None else "demo"
    folder = RunFolder(options.run or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.check_new()
    return folder


def _dora(options: FinetuneOptions) -> DoRA:
    try:
        return DoRA(
            target_modules=options.target_modules,
            exclude_modules=options.exclude_modules,
            dim=options.dim,
            alpha=options.alpha,
            dropout=options.dropout,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _documents(options: FinetuneOptions) -> list[str]:
    if options.data is None:
        return demo_documents()
    with _saying_where(options, "data"):
        return read_documents(options.data)


@contextlib.contextmanager
def _saying_where(options: FinetuneOptions, name: str) -> Iterator[None]:
    """Add to the errors of a resumed run how to give what was moved since it was started."""
    try:
        yield
    except UserError as error:
        if options.resume is None:
            raise
        raise UserError(f"{error}; what was moved since the run was started is given with --{name}") from error


def _resolve_base(options: FinetuneOptions, display: Display, ranks: Ranks) -> Path:
    if options.base == "smollm2":
        return ranks.main_first(resolve_base, options.base, display)
    with _saying_where(options, "base"):
        return resolve_base(options.base, display)


def _adapt(dora: DoRA, model: Any) -> DoRAReport:
    try:
        with fitting_in_memory(f"--dim: an adapter of {dora.dim}", _SMALLER_ADAPTER):
            dora(model)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    assert dora.report is not None
    return dora.report


def _summary(report: DoRAReport) -> str:
    """The report with one row for all layers that differ in their number only; report.txt has every row."""

    def kind(path: str) -> str:
        return ".".join("*" if part.isdigit() else part for part in path.split("."))

    counts = Counter((kind(site.path), site.layout, site.weight, site.trainable) for site in report.sites)
    lines = [
        f"  {count:3} x {path}  {layout}  {'x'.join(map(str, weight))}  {trainable:,} trainable each"
        for (path, layout, weight, trainable), count in counts.items()
    ]
    share = 100 * report.num_trainable / report.num_total
    lines.insert(
        0,
        f"adapted {len(report.sites)} layers: {report.num_trainable:,} trainable of "
        f"{report.num_total:,} parameters ({share:.2f} %)",
    )
    return "\n".join(lines)
