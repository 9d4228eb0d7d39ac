"""`CheckpointError`, and the steps of saving and loading that raise it on every rank."""

from __future__ import annotations

from dora_fx.ranks import CollectiveSteps


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or cannot be loaded; nothing was changed."""


_ranks = CollectiveSteps(CheckpointError)
collective_step, gather, from_first_rank = _ranks.step, _ranks.gather, _ranks.from_first_rank
