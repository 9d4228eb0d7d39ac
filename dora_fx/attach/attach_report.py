"""The report of a call of `DoRA`: one row per site, and totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_fx.attach.frozen_experts import text_on_fused_experts
from dora_fx.attach.matching import adapted_layers, of_all_experts
from dora_fx.megatron import expert_number_maybe
from dora_fx.modules import quantised_weight_maybe


@dataclass(frozen=True)
class SiteReport:
    """One adapted layer: shapes are this rank's shards, `path` has its number in the whole model."""

    path: str
    layout: str
    weight: tuple[int, ...]
    lora_a: tuple[int, ...]
    lora_b: tuple[int, ...]
    trainable: int


@dataclass(frozen=True)
class DoRAReport:
    """Sites in model order, the linear layers left alone, and parameter counts of this rank.

    `frozen_experts` says which experts are no layers and stay frozen; None where all are layers, or there are none.
    """

    sites: tuple[SiteReport, ...]
    unmatched_linears: tuple[str, ...]
    num_trainable: int
    num_total: int
    frozen_experts: str | None = None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("module", "layout", "weight", "A", "B", "trainable")]
        rows += _rows(self.sites)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        share = 100.0 * self.num_trainable / max(self.num_total, 1)
        lines.append(
            f"{len(self.sites)} layers adapted: {self.num_trainable:,} trainable of "
            f"{self.num_total:,} parameters ({share:.2f} %)"
        )
        if self.unmatched_linears:
            lines.append(f"not adapted: {', '.join(_joined(self.unmatched_linears))}")
        if self.frozen_experts:
            lines.append(self.frozen_experts)
        return "\n".join(lines)


def _rows(sites: Sequence[SiteReport]) -> list[tuple[str, ...]]:
    """Return the cells of the table; experts that differ in nothing but their numbers are one row."""
    alike: dict[Any, list[SiteReport]] = {}
    for site in sites:
        shapes = (site.weight, site.lora_a, site.lora_b)
        alike.setdefault((of_all_experts(site.path), site.layout, shapes), []).append(site)
    return [
        (*_joined([site.path for site in group]), layout, *map(_shape, shapes), f"{sum(s.trainable for s in group):,}")
        for (_, layout, shapes), group in alike.items()
    ]


def _joined(paths: Sequence[str]) -> list[str]:
    """Return paths in their order, with experts that differ in their numbers alone as one, `local_experts.0-3`."""
    numbers: dict[str, list[int]] = {}
    for path in paths:
        number = expert_number_maybe(path)
        numbers.setdefault(of_all_experts(path), []).extend([] if number is None else [number])
    return [path.replace("*", _ranges(experts)) if experts else path for path, experts in numbers.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, those that follow one another as first and last."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _num_parameters(chunk: nn.Module) -> int:
    """Return the number of a chunk's parameters; a quantised weight counts as the matrix that it stands for."""
    stored = sum(parameter.numel() for parameter in chunk.parameters())
    weights = [quantised_weight_maybe(module) for module in chunk.modules()]
    quantised = [weight for weight in weights if weight is not None]
    return stored + sum(weight.shape[0] * weight.shape[1] - weight.tensors[0].numel() for weight in quantised)


def report_on(chunks: Sequence[nn.Module], unmatched_linears: Sequence[str]) -> DoRAReport:
    """Return the report on every DoRA site of the chunks."""
    sites = []
    for _, (_, path, site) in adapted_layers(chunks):
        adapter = site.adapter
        a, b = adapter.linear_in.weight, adapter.linear_out.weight
        sites.append(
            SiteReport(
                path=path,
                layout=adapter.layout_name,
                weight=(*a.shape[:-2], *site.base_weight.shape),
                lora_a=tuple(a.shape),
                lora_b=tuple(b.shape),
                trainable=sum(p.numel() for p in adapter.parameters() if p.requires_grad),
            )
        )
    return DoRAReport(
        sites=tuple(sites),
        unmatched_linears=tuple(unmatched_linears),
        num_trainable=sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad),
        num_total=sum(map(_num_parameters, chunks)),
        frozen_experts=text_on_fused_experts(chunks),
    )
