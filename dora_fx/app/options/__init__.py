"""Options of `dora-fx finetune`: dataclasses, their command line, and their checks.

Nothing here imports torch, so that a misspelled option is answered at once.
"""

from dora_fx.app.options.command_line import with_hint, with_lists, with_own_names
from dora_fx.app.options.finetune_options import (
    DEMO_DEFAULTS,
    LIST_OPTIONS,
    PAIR_OPTIONS,
    FinetuneOptions,
    ModelOptions,
    TrainingOptions,
    add_options,
    check_resumable,
    options_from,
    saved_options,
)

__all__ = [
    "DEMO_DEFAULTS",
    "LIST_OPTIONS",
    "PAIR_OPTIONS",
    "FinetuneOptions",
    "ModelOptions",
    "TrainingOptions",
    "add_options",
    "check_resumable",
    "options_from",
    "saved_options",
    "with_hint",
    "with_lists",
    "with_own_names",
]
