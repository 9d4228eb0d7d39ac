"""The error of checkpoints, and steps of all ranks that raise it on each of them."""

from __future__ import annotations

from dora_fx.ranks import FailingTogether


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or cannot be loaded; nothing was changed."""


_ranks = FailingTogether(CheckpointError)
failing_together, gather, from_first_rank = _ranks.step, _ranks.gather, _ranks.from_first_rank
