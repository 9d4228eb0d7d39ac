"""Measurements of a training step, for the display and the logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one optimizer step.

    Attributes:
        loss: mean over the learned tokens, in nats.
        grad_norm: before clipping.
        tokens: number of tokens without padding.
        problem: why the step made no update; then the loss or the norm is not finite.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    problem: str | None = None
