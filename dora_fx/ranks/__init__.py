"""Many processes as one: their groups, what they tell each other, what they must agree on, how they fail together."""

from dora_fx.ranks.agreement import (
    check_same_settings,
    of_all_stages,
    problem_of_any_rank_maybe,
    raise_on_every_rank,
    raise_on_every_rank_of_model,
    stale_on_any_rank,
    value_of_first_replica,
)
from dora_fx.ranks.exchange import broadcast_object, gather_objects, gather_objects_on_first_rank, gather_through_store
from dora_fx.ranks.failing_together import FailingTogether, describe_error
from dora_fx.ranks.groups import group_rank, group_size, has_other_ranks, resolve_group, world_group

__all__ = [
    "FailingTogether",
    "broadcast_object",
    "check_same_settings",
    "describe_error",
    "gather_objects",
    "gather_objects_on_first_rank",
    "gather_through_store",
    "group_rank",
    "group_size",
    "has_other_ranks",
    "of_all_stages",
    "problem_of_any_rank_maybe",
    "raise_on_every_rank",
    "raise_on_every_rank_of_model",
    "resolve_group",
    "stale_on_any_rank",
    "value_of_first_replica",
    "world_group",
]
