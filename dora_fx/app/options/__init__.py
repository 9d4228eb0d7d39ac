"""Options of `dora-fx finetune`: dataclasses, their command line, and their checks.

Nothing here imports torch, so that a misspelled option is answered at once.
"""

from dora_fx.app.options.command_line import with_hint, with_lists, with_own_names
from dora_fx.app.options.demo import DEMO_DEFAULTS
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.app.options.hub_name import HubName, hub_name_maybe, local_path_and_part, shown_name
from dora_fx.app.options.option_groups import ModelOptions, TrainingOptions
from dora_fx.app.options.option_parser import (
    LAYOUT_OPTIONS,
    LIST_OPTIONS,
    PAIR_OPTIONS,
    add_options,
    add_options_of_layout,
    options_from,
)
from dora_fx.app.options.resumption import check_resumable, saved_options

__all__ = [
    "DEMO_DEFAULTS",
    "LAYOUT_OPTIONS",
    "LIST_OPTIONS",
    "PAIR_OPTIONS",
    "FinetuneOptions",
    "HubName",
    "ModelOptions",
    "TrainingOptions",
    "add_options",
    "add_options_of_layout",
    "check_resumable",
    "hub_name_maybe",
    "local_path_and_part",
    "options_from",
    "saved_options",
    "shown_name",
    "with_hint",
    "with_lists",
    "with_own_names",
]
