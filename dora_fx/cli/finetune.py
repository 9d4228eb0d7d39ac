"""`dora-fx finetune`: from a base model and a text to a trained adapter in a run folder."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

import dora_fx
from dora_fx import DoRA
from dora_fx.cli.base_model import DTYPES, build_base_model, load_checkpoint, resolve_base
from dora_fx.cli.compilation import compile_in_place
from dora_fx.cli.data import TokenBlocks, cut_blocks, demo_documents, read_documents, tokenize
from dora_fx.cli.errors import UserError
from dora_fx.cli.options import (
    FinetuneOptions,
    add_options,
    check_resumable,
    options_from,
    options_in_order,
    saved_options,
)
from dora_fx.cli.progress import Display
from dora_fx.cli.ranks import Ranks
from dora_fx.cli.run_folder import RunFolder
from dora_fx.cli.stop_signals import StopSignals
from dora_fx.cli.trainer import Trainer
from dora_fx.cli.training_run import TrainingRun
from dora_fx.report import DoRAReport

__all__ = ["HELP", "options_in_order", "parser", "run"]

HELP = "train a DoRA adapter on a text"


def parser() -> Any:
    """The command's jsonargparse parser."""
    import jsonargparse

    command = jsonargparse.ArgumentParser(description=__doc__, exit_on_error=False)
    add_options(command)
    return command


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
    documents = demo_documents() if options.data is None else read_documents(options.data)
    device = _device(options)
    display = Display(quiet=not ranks.is_main)
    stop = StopSignals(agree=ranks.largest)
    with stop.installed(), ranks.world(device, options.seed, options.tp):
        path = _resolve_base(options, display, ranks)
        with display.phase(f"loading {path.name}"):
            checkpoint = load_checkpoint(path, DTYPES[options.dtype])
        _check_sequence_length(options, checkpoint.config)
        blocks = _blocks(options, documents, checkpoint.tokenizer)
        ranks.check_agreement(saved_options(options) | {"text": blocks.fingerprint, **_versions()})
        with display.phase("building the Megatron model"):
            model = build_base_model(checkpoint, options, device)
        report = _adapt(dora, model)
        compile_in_place(model, options)
        display.say(
            f"text: {blocks.num_tokens:,} tokens; {len(blocks.train)} training sequences and "
            f"{len(blocks.held_out)} held-out ones of {options.sequence_length}; "
            f"{options.dtype} on {_place(options, device)}"
        )
        display.say(_summary(report))
        trainer = Trainer(model, blocks, options, device)
        if options.resume is None:
            ranks.from_main(folder.create, saved_options(options), str(report))
        training = TrainingRun(options, ranks, folder, display, stop, trainer, checkpoint.tokenizer, device)
        return training.run(blocks.held_out)


def _check_world_size(options: FinetuneOptions, ranks: Ranks) -> None:
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
        check_resumable(options, yaml.safe_load(folder.resumable_config().read_text(encoding="utf-8")))
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


def _device(options: FinetuneOptions) -> str:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UserError("--device cuda: torch finds no CUDA GPU here")
    if options.device == "auto":
        return "cuda" if available else "cpu"
    return options.device


def _resolve_base(options: FinetuneOptions, display: Display, ranks: Ranks) -> Path:
    if options.base != "smollm2":
        return resolve_base(options.base)
    with display.phase("finding SmolLM2-135M, a download of about 90 MB the first time"):
        return ranks.main_first(resolve_base, options.base)


def _check_sequence_length(options: FinetuneOptions, config: Any) -> None:
    if options.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length: found {options.sequence_length}, "
            f"expected at most {config.max_position_embeddings}, the base model's"
        )


def _blocks(options: FinetuneOptions, documents: list[str], tokenizer: Any) -> TokenBlocks:
    tokens = tokenize(documents, tokenizer)
    return cut_blocks(tokens, options.sequence_length, options.held_out_fraction, options.max_held_out)


def _adapt(dora: DoRA, model: Any) -> DoRAReport:
    try:
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
