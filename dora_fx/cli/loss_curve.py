"""The picture of a run: training loss by step, and the held-out loss where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHING = 0.9


def draw_loss_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the rows of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="held out")
        for step, loss in held_out:
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 7), ha="center")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average without the pull of its start value."""
    averages, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        averages.append(total / weight)
    return averages
