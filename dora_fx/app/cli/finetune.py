"""`dora-fx finetune`: trains an adapter of a base model on a text, and writes a run folder."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dora_fx
from dora_fx import DoRA
from dora_fx.app.bases import (
    DTYPES,
    build_base_model,
    check_experts,
    chosen_device,
    estimate_memory,
    fitting_in_memory,
    load_checkpoint,
    load_tokenizer,
    memory_warning_maybe,
    name_of_base,
    resolve_spec,
)
from dora_fx.app.cli.run_inputs import files_of_data, name_of_run, path_of_base, saying_where, with_commits
from dora_fx.app.data import BaseTokenizer, TrainingData, demo_data, read_data
from dora_fx.app.errors import UserError
from dora_fx.app.options import FinetuneOptions, check_resumable, options_from, saved_options
from dora_fx.app.runs import Display, Ranks, RunFolder, StopSignals, check_logs, check_shared
from dora_fx.app.training import Trainer, TrainingRun, recompute_layers, training_text, with_steps
from dora_fx.attach import DoRAReport
from dora_fx.models import Spec

_SMALLER_ADAPTER = "take a smaller --dim, or fewer --target-modules"


def run(parsed: dict[str, Any]) -> int:
    """Check everything that can be checked without the model, then load, train and write; return the exit code.

    Raises:
        UserError: an option, a file or a model is not usable.
        Interrupted: a signal came while there was nothing to save.
    """
    ranks = Ranks.from_environment()
    display = Display(quiet=not ranks.is_main)
    with display.never_silent():
        return _run(parsed, ranks, display)


def _run(parsed: dict[str, Any], ranks: Ranks, display: Display) -> int:
    options = with_commits(ranks.together(_checked_options, parsed, ranks), ranks)
    files = files_of_data(options, display, ranks)
    options, inputs = ranks.together(_read_inputs, options, files)
    device, spec = inputs.device, inputs.spec
    stop = StopSignals(agree=ranks.largest)
    with stop.installed(), ranks.world(device, options.seed, **_parallel_sizes(options)):
        # Rank 0's: a default name has the time in it, which differs between ranks.
        folder = ranks.from_main(lambda: inputs.folder)
        path = path_of_base(options, display, ranks)
        if options.show_sample:
            return _show_sample(options, inputs, path, display, ranks)
        with display.phase(f"loading {name_of_base(options.base, path)}"):
            checkpoint = ranks.together(load_checkpoint, path, DTYPES[options.dtype])
        ranks.together(check_experts, checkpoint.config, options)
        tokenizer = BaseTokenizer(path, checkpoint.tokenizer, checkpoint.config.vocab_size)
        text = ranks.together(training_text, options, inputs.data, tokenizer, checkpoint.config, device)
        options = with_steps(options, len(text.sequences.train))
        ranks.check_agreement(
            saved_options(options) | {"spec": spec, "text": text.sequences.fingerprint, **_versions()}
        )
        with display.phase("building the Megatron model"):
            model = ranks.together(build_base_model, checkpoint, options, device, spec)
        report = ranks.together(_adapt, inputs.dora, model)
        if options.recompute:
            recompute_layers(model)
        if options.compile != "none":
            dora_fx.compile_model(model, options.compile, inner_compiler=options.inner_compiler)
        place = f"{options.dtype} on {_place(options, device)}, {spec} spec"
        for note in (*text.notes, *inputs.notes, f"{options.steps} steps; {place}"):
            display.say(note)
        if unknown := tokenizer.beyond_the_model():
            display.say(f"tokens of the tokenizer that the model lacks: {unknown}; the text has none of them")
        display.say(_summary(report))
        estimate = estimate_memory(model, options)
        display.say(str(estimate))
        if warning := memory_warning_maybe(estimate, options, device):
            display.say(warning)
        with fitting_in_memory("the optimizer", _SMALLER_ADAPTER):
            trainer = ranks.together(Trainer, model, text.sequences, options, device)
        _make_folder(folder, options, str(report), ranks)
        return TrainingRun(options, ranks, folder, display, stop, trainer, tokenizer, text.prompt, device).run()


@dataclass(frozen=True)
class _Inputs:
    """The inputs that each rank reads by itself before the model is built."""

    folder: RunFolder
    dora: DoRA
    data: TrainingData
    device: str
    spec: Spec
    notes: Sequence[str]


def _checked_options(parsed: dict[str, Any], ranks: Ranks) -> FinetuneOptions:
    options = options_from(parsed)
    _check_world_size(options, ranks)
    if ranks.is_main:
        check_logs(options.logs)
    return options


def _read_inputs(options: FinetuneOptions, files: Sequence[Path]) -> tuple[FinetuneOptions, _Inputs]:
    """Read the inputs that the options name, except the base; return them with options that the spec supports."""
    folder = _run_folder(options)
    dora = _dora(options)
    data = _data(options, files)
    device = chosen_device(options.device)
    spec = resolve_spec(options, device)
    options, notes = without_packing_beside(spec, options, data)
    return options, _Inputs(folder, dora, data, device, spec, notes)


def _parallel_sizes(options: FinetuneOptions) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "expert_model_parallel_size": options.ep,
        "expert_tensor_parallel_size": options.expert_tensor_parallel,
    }


def _make_folder(folder: RunFolder, options: FinetuneOptions, report: str, ranks: Ranks) -> None:
    """Make the folder of a new run and check that all ranks see it; remove it again if they do not."""
    if options.resume is not None:
        check_shared(ranks, folder.path, "--resume")
        return
    ranks.from_main(folder.create, saved_options(options), report)
    try:
        check_shared(ranks, folder.path, "--run")
    except UserError:
        if ranks.is_main:
            shutil.rmtree(folder.path)
        raise


def _check_world_size(options: FinetuneOptions, ranks: Ranks) -> None:
    expected = options.tp * options.pp * options.dp
    if ranks.world_size == expected:
        return
    if expected == 1:
        raise UserError(
            f"found {ranks.world_size} processes and no --tp; give --tp {ranks.world_size} to shard the model over "
            "them, or --pp or --dp, or start the command without torchrun"
        )
    sizes = [(name, getattr(options, name)) for name in ("tp", "pp", "dp")]
    shown = " ".join(f"--{name} {size}" for name, size in sizes if size > 1 or name == "tp")
    raise UserError(
        f"{shown}: found {ranks.world_size} processes, expected {expected}, the product of the parallel sizes; "
        f"start it with: torchrun --standalone --nproc-per-node {expected} --no-python -- dora-fx finetune ..."
    )


def _versions() -> dict[str, str]:
    import megatron.core

    return {"dora_fx": dora_fx.__version__, "torch": torch.__version__, "megatron-core": megatron.core.__version__}


def _place(options: FinetuneOptions, device: str) -> str:
    sizes = {"tensor": options.tp, "pipeline": options.pp, "data": options.dp}
    shown = [f"{size} {name}-parallel" for name, size in sizes.items() if size > 1]
    if not shown:
        return device
    own = options.ep > 1 or options.expert_tensor_parallel != options.tp
    experts = f", experts on {options.ep} x {options.expert_tensor_parallel} of them" if own else ""
    return f"{device}, {' x '.join(shown)} ranks{' with sequence parallelism' * options.sequence_parallel}{experts}"


def _run_folder(options: FinetuneOptions) -> RunFolder:
    """Return the folder to create, after a check that it is free, or the folder to resume, checked with the options."""
    if options.resume is not None:
        folder = RunFolder(options.resume)
        check_resumable(options, folder.saved_config())
        folder.check_rows()
        return folder
    name = name_of_run(options.data) if options.data is not None else f"demo-{options.demo}"
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
            rank_pattern=options.rank_pattern,
            alpha_pattern=options.alpha_pattern,
            use_rslora=options.use_rslora,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _data(options: FinetuneOptions, files: Sequence[Path]) -> TrainingData:
    if options.data is None:
        assert options.demo != "none"
        return demo_data(options.demo)
    with saying_where(options, "data"):
        return read_data(Path(options.data), options.data_format, options.columns, files)


def without_packing_beside(
    spec: Spec, options: FinetuneOptions, data: TrainingData
) -> tuple[FinetuneOptions, Sequence[str]]:
    """Turn packing off for specs that cannot separate packed samples; return the options and notes for the user.

    Raises:
        UserError: the resumed run was trained on packed samples.
    """
    if spec == "local" or options.no_packing or data.format.name == "text":
        return options, ()
    if options.resume is not None:
        raise UserError(
            f"--spec: found {spec}, expected local: {options.resume} is trained on packed samples, which "
            f"the attention of {spec} does not separate"
        )
    return replace(options, no_packing=True), (
        f"the {spec} spec's attention does not separate packed samples: each sequence has one sample",
    )


def _show_sample(options: FinetuneOptions, inputs: _Inputs, path: Path, display: Display, ranks: Ranks) -> int:
    """Print the first sample as runs of tokens that are learned or given; return the exit code.

    The base's weights are not read.
    """
    config, loaded = ranks.together(load_tokenizer, path)
    tokenizer = BaseTokenizer(path, loaded, config.vocab_size)
    text = ranks.together(training_text, options, inputs.data, tokenizer, config, inputs.device)
    for note in text.notes:
        display.say(note)
    if not text.samples:
        display.say("every token of a text is learned")
        return 0
    sample = text.samples[0]
    display.say(f"{sample.where}: {len(sample.ids)} tokens, {sample.num_targets} of them learned")
    for learned, count, run in tokenizer.runs(sample):
        display.say(f"  {'learned' if learned else 'given':8}{count:5} {'token' if count == 1 else 'tokens'}  {run!r}")
    return 0


def _adapt(dora: DoRA, model: Any) -> DoRAReport:
    try:
        with fitting_in_memory(f"--dim: an adapter of {dora.dim}", _SMALLER_ADAPTER):
            dora(model)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    assert dora.report is not None
    return dora.report


def _summary(report: DoRAReport) -> str:
    """Format the report with one row for all layers that differ in their number alone; report.txt has every row."""

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
