"""Adapters onto a model and off again: configuration, matching, plan, probe, report, merge, and several by name."""

from dora_fx.attach.attach_listeners import on_attach
from dora_fx.attach.attach_report import DoRAReport
from dora_fx.attach.config import DoRA
from dora_fx.attach.first_step import check_torch_wrappers
from dora_fx.attach.kept_adapter import merged_layer_maybe, was_quantised
from dora_fx.attach.learning_rates import config_overrides, parameter_groups
from dora_fx.attach.matching import adapted_layers
from dora_fx.attach.merge_checks import NOTHING_ADAPTED, merge_problem_maybe
from dora_fx.attach.merged_weights import merge_tensors, merged_weight, served_dtype
from dora_fx.attach.merging import merge, merged, unmerge
from dora_fx.attach.mixed_batch import mixed
from dora_fx.attach.named_adapters import (
    active_adapter,
    adapter,
    adapter_names,
    add_adapter,
    delete_adapter,
    set_adapter,
)
from dora_fx.attach.other_trainables import warn_of_other_trainables
from dora_fx.attach.plan import AttachPlan, attach, plan_attachment
from dora_fx.attach.probe import try_layers
from dora_fx.attach.routers import routers_of

__all__ = [
    "NOTHING_ADAPTED",
    "AttachPlan",
    "DoRA",
    "DoRAReport",
    "active_adapter",
    "adapted_layers",
    "adapter",
    "adapter_names",
    "add_adapter",
    "attach",
    "check_torch_wrappers",
    "config_overrides",
    "delete_adapter",
    "merge",
    "merge_problem_maybe",
    "merge_tensors",
    "merged",
    "merged_layer_maybe",
    "merged_weight",
    "mixed",
    "on_attach",
    "parameter_groups",
    "plan_attachment",
    "routers_of",
    "served_dtype",
    "set_adapter",
    "try_layers",
    "unmerge",
    "warn_of_other_trainables",
    "was_quantised",
]
