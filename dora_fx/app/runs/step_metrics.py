"""What one training step is measured by, for whoever shows it or keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetrics:
    """Of one optimizer step.

    `loss` is the mean over the tokens that are learned, in nats; `grad_norm` is before clipping; `tokens` are all but
    padding. `problem` says why the step made no update; the loss or the norm is not finite then.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    problem: str | None = None
