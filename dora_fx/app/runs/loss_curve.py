"""Draws the curves of a run: training and held-out losses by step, and the speed below them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHING = 0.9
# An average over some ten steps lags behind the loss of a shorter run, and says less than its few points.
_FEWEST_SMOOTHED = 30
_HEADROOM = 1.25


def draw_loss_curve(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Plot the rows of metrics.jsonl to a PNG: losses in nats per token, and below them tokens per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, speed = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    _draw_losses(losses, rows)
    losses.set_title(title, loc="left", parse_math=False)
    _draw_speed(speed, rows)
    # Steps are integers; with few of them matplotlib would label fractions.
    speed.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120, format="png")


def _draw_losses(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [
        (row["step"], row["held_out_loss"]) for row in rows if math.isfinite(row.get("held_out_loss", math.nan))
    ]
    if train:
        steps, losses = zip(*train, strict=True)
        if len(steps) < _FEWEST_SMOOTHED:
            axes.plot(steps, losses, color="tab:blue", label="training, each step")
        else:
            axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
            axes.plot(steps, _smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="held out")
        # On a white box, so that the number stays legible on top of the training loss.
        box = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1)
        for step, loss in held_out:
            at = dict(textcoords="offset points", xytext=(0, 9), ha="center")
            axes.annotate(f"{loss:.3f}", (step, loss), color="tab:orange", bbox=box, **at)
    axes.set_ylabel("loss (nats per token)")
    # Room for the number above the highest point.
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()


def _draw_speed(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    timed = [row for row in rows if row.get("seconds", 0) > 0 and "tokens" in row]
    if timed:
        speeds = [row["tokens"] / row["seconds"] for row in timed]
        median = statistics.median(speeds)
        axes.plot([row["step"] for row in timed], speeds, color="tab:green", linewidth=1)
        axes.axhline(median, color="tab:green", alpha=0.5, linestyle="--", label=f"median {median:,.0f}")
        axes.set_ylim(0, _HEADROOM * max(speeds))
        axes.legend(loc="lower right")
    axes.set_xlabel("optimizer step (the first compiles)")
    axes.set_ylabel("tokens/s")
    axes.grid(alpha=0.3)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Compute the exponential moving average, corrected for the bias of its start value."""
    averages, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        averages.append(total / weight)
    return averages
