"""Explanations as tables for a terminal or a file."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

from rich.box import ASCII
from rich.console import Console, Group, RenderableType
from rich.table import Table

from dora_fx.explanation import VARIANTS, Collective, Explanation, KindCosts, StageCosts

_TITLES = {"base": "frozen base", "lora": "LoRA", "dora": "DoRA"}
_WIDTH = 110
_MEMORY = {
    "base": "frozen parameters",
    "adapters": "adapters",
    "cached": "cached norms and factors",
    "gradients": "gradients",
    "partial_sums": "partial sums",
    "optimizer": "optimizer state",
    "activations": "saved activations",
    "transient": "worst moment of a layer",
}


def text_of(renderable: RenderableType) -> str:
    """Return what rich would print, without colours, in lines of at most 110 characters."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH, no_color=True, highlight=False).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def explanation_tables(explanation: Explanation) -> Group:
    """Return the tables: each kind of layer, the memory of the stages, and the collectives of the largest stage."""
    parts: list[RenderableType] = [_heading(explanation)]
    parts += [_kind_table(kind) for kind in explanation.kinds]
    parts.append(_stages_table(explanation.stages))
    largest = explanation.largest_stage
    parts += [_memory_table(largest), _collectives_table(largest)]
    return Group(*parts)


def _heading(explanation: Explanation) -> str:
    run = explanation.run
    of_experts = f", EP {run.ep}, ETP {run.expert_tensor_parallel}" if explanation.num_experts else ""
    layout = f"TP {run.tp}{' + SP' if run.sequence_parallel else ''}, PP {run.pp}, DP {run.dp}{of_experts}"
    batch = f"{run.micro_batches} micro-batches of {run.batch_size} x {run.sequence_length} tokens"
    others = f"rank {run.dim}, {run.dtype}, {run.attention} attention{', recomputation' if run.recompute else ''}"
    made_by = f"torch {explanation.torch}, megatron-core {explanation.megatron_core}"
    evenly = f"; tokens go to {explanation.num_experts} experts evenly" if explanation.num_experts else ""
    return (
        f"{explanation.base}: {layout}, {run.num_ranks} ranks; {batch} a step; {others}\n"
        f"Per rank, counted in graphs of {made_by}{evenly}\n"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=ASCII, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _kind_table(kind: KindCosts) -> Table:
    title = (
        f"{kind.name}, one micro-batch" if kind.name in ("embedding", "output") else f"one {kind.name}, one micro-batch"
    )
    table = _table(title, "", *(_TITLES[variant] for variant in VARIANTS))
    trained = {"base": 0, "lora": kind.lora_parameters, "dora": kind.lora_parameters + kind.magnitudes}
    costs = [kind.variants[variant] for variant in VARIANTS]
    table.add_row("parameters, frozen", *[f"{kind.base_parameters:,}"] * len(VARIANTS))
    table.add_row("parameters, trained", *(f"{trained[variant]:,}" for variant in VARIANTS))
    table.add_row("TFLOP forward", *(_tera(one.forward.flops) for one in costs))
    table.add_row("TFLOP backward", *(_tera(one.backward.flops) for one in costs))
    table.add_row("MiB saved for backward", *(mebi(one.saved_bytes) for one in costs))
    for name, sent in (
        ("forward", [one.forward.collectives for one in costs]),
        ("backward", [one.backward.collectives for one in costs]),
    ):
        for label, counts in _side_by_side(sent):
            table.add_row(f"{name}: {label}", *counts)
    return table


def _side_by_side(of_variant: Sequence[tuple[Collective, ...]]) -> list[tuple[str, list[str]]]:
    """Rows of collectives, equal ones in one row, with their counts in each variant."""
    rows: dict[tuple[int, str, str, int], list[int]] = {}
    owners: dict[tuple[int, str, str, int], list[str]] = {}
    for index, collectives in enumerate(of_variant):
        for one in collectives:
            key = (-one.num_bytes, one.kind, one.group, one.num_ranks)
            rows.setdefault(key, [0] * len(of_variant))[index] += one.count
            owners.setdefault(key, []).append(one.site.rpartition(".")[2])
    return [
        (
            f"{kind} {mebi(-size)} MiB, {group} {ranks}{_listed(owners[size, kind, group, ranks])}",
            [str(count) if count else "-" for count in counts],
        )
        for (size, kind, group, ranks), counts in sorted(rows.items())
    ]


def _listed(names: list[str]) -> str:
    """The modules that messages belong to, each once, where they are known."""
    known = [name for name in dict.fromkeys(names) if name]
    return f" ({', '.join(known)})" if known else ""


def _stages_table(stages: Sequence[StageCosts]) -> Table:
    table = _table(
        "pipeline stages: estimated peak in GiB", "stage", "layers", "in flight", *(_TITLES[v] for v in VARIANTS)
    )
    for stage in stages:
        layers = ", ".join(f"{count} x {name}" for name, count in stage.kinds.items())
        peaks = (gibi(stage.variants[variant].memory.peak) for variant in VARIANTS)
        table.add_row(str(stage.stage), layers, str(stage.in_flight), *peaks)
    return table


def _memory_table(stage: StageCosts) -> Table:
    table = _table(f"memory of a rank of stage {stage.stage}, GiB", "", *(_TITLES[variant] for variant in VARIANTS))
    memories = [stage.variants[variant].memory for variant in VARIANTS]
    for name, label in _MEMORY.items():
        table.add_row(label, *(gibi(getattr(memory, name)) for memory in memories))
    table.add_row("estimated peak", *(gibi(memory.peak) for memory in memories))
    flops = (f"{stage.variants[variant].flops_per_step / 1e12:,.1f}" for variant in VARIANTS)
    table.add_row("TFLOP per step", *flops)
    return table


def _collectives_table(stage: StageCosts) -> Table:
    table = _table(f"messages of a rank of stage {stage.stage}", "", *(_TITLES[variant] for variant in VARIANTS))
    variants = [stage.variants[variant] for variant in VARIANTS]
    for name, sent in (
        ("per micro-batch", [one.micro_batch for one in variants]),
        ("per step, first", [one.step.refresh for one in variants]),
        ("per step, last", [one.step.gradients for one in variants]),
    ):
        for label, counts in _side_by_side(sent):
            table.add_row(f"{name}: {label}", *counts)
    return table


def comparison_table(explanations: Sequence[Explanation], memory: int | None = None) -> Table:
    """Return the layouts side by side, DoRA's costs on the largest stage of each, and what DoRA adds to LoRA.

    Args:
        explanations: of the same base.
        memory: of a device in bytes; with it the table says which layouts fit.
    """
    runs = [dataclasses.asdict(one.run) for one in explanations]
    differing = [name for name in runs[0] if any(run[name] != runs[0][name] for run in runs)]
    columns = [", ".join(f"{name}={run[name]}" for name in differing) or "as given" for run in runs]
    title = f"{explanations[0].base}: layouts side by side, DoRA on the largest stage"
    table = _table(title, "", *columns)
    stages = [one.largest_stage for one in explanations]
    memories = [stage.variants["dora"].memory for stage in stages]
    loras = [stage.variants["lora"].memory for stage in stages]
    table.add_row("ranks", *(str(one.run.num_ranks) for one in explanations))
    table.add_row("micro-batches of a step", *(str(one.run.micro_batches) for one in explanations))
    table.add_row("largest stage", *(f"{stage.stage}, {stage.in_flight} in flight" for stage in stages))
    for name, label in _MEMORY.items():
        table.add_row(f"{label}, GiB", *(gibi(getattr(each, name)) for each in memories))
    table.add_row("estimated peak, GiB", *(gibi(each.peak) for each in memories))
    more = (gibi(dora.peak - lora.peak) for dora, lora in zip(memories, loras, strict=True))
    table.add_row("  beyond LoRA's", *more)
    if memory is not None:
        fit = (
            "fits" if one.fits(memory) else f"{gibi(one.largest_stage.peak - memory)} too much" for one in explanations
        )
        table.add_row(f"in {gibi(memory)} GiB", *fit)
    flops = (f"{stage.variants['dora'].flops_per_step / 1e12:,.1f}" for stage in stages)
    table.add_row("TFLOP per rank and step", *flops)
    for group in ("tp", "pp", "dp"):
        sizes = (
            gibi(_sent(stage, one.run.micro_batches, group)) for stage, one in zip(stages, explanations, strict=True)
        )
        table.add_row(f"GiB through {group} messages per step", *sizes)
    return table


def _sent(stage: StageCosts, micro_batches: int, group: str) -> int:
    """Bytes of a step's messages in groups of one kind, each counted with its larger side."""
    dora = stage.variants["dora"]
    per_step = (*dora.step.refresh, *dora.step.gradients)
    repeated = sum(one.num_bytes * one.count for one in dora.micro_batch if one.group == group) * micro_batches
    return repeated + sum(one.num_bytes * one.count for one in per_step if one.group == group)


def mebi(size: int) -> str:
    """Return bytes in MiB, with two digits where they are no whole number of them."""
    return f"{size / 2**20:,.2f}" if size % 2**20 else f"{size >> 20:,}"


def gibi(size: int) -> str:
    """Return bytes in GiB."""
    return f"{size / 2**30:,.3f}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.4f}"
