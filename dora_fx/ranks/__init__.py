"""Communication between processes: process groups, exchange of Python objects, agreement checks, and shared failure."""

from dora_fx.ranks.agreement import (
    check_same_settings,
    of_all_parts,
    problem_of_any_rank_maybe,
    raise_on_every_rank,
    raise_on_every_rank_of_model,
    stale_on_any_rank,
    value_of_first_replica,
)
from dora_fx.ranks.collective_step import CollectiveSteps, error_text
from dora_fx.ranks.exchange import broadcast_object, gather_objects, gather_objects_on_first_rank, gather_through_store
from dora_fx.ranks.groups import group_rank, group_size, has_other_ranks, resolve_group, world_group

__all__ = [
    "CollectiveSteps",
    "broadcast_object",
    "check_same_settings",
    "error_text",
    "gather_objects",
    "gather_objects_on_first_rank",
    "gather_through_store",
    "group_rank",
    "group_size",
    "has_other_ranks",
    "of_all_parts",
    "problem_of_any_rank_maybe",
    "raise_on_every_rank",
    "raise_on_every_rank_of_model",
    "resolve_group",
    "stale_on_any_rank",
    "value_of_first_replica",
    "world_group",
]
