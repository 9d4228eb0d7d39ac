"""Loads the base that `--base` or a run names, builds its model, reads saved adapters, and estimates memory."""

from dora_fx.app.bases.base_model import (
    DTYPES,
    build_base_model,
    check_experts,
    chosen_device,
    load_checkpoint,
    load_tokenizer,
    name_of_base,
    resolve_base,
    resolve_spec,
)
from dora_fx.app.bases.memory import check_batch_fits, estimate_memory, fitting_in_memory, memory_warning_maybe
from dora_fx.app.bases.saved_adapter import (
    load_base,
    open_saved_adapter,
    or_user_error,
    read_saved_adapter,
    write_folder,
)

__all__ = [
    "DTYPES",
    "build_base_model",
    "check_batch_fits",
    "check_experts",
    "chosen_device",
    "estimate_memory",
    "fitting_in_memory",
    "load_base",
    "load_checkpoint",
    "load_tokenizer",
    "memory_warning_maybe",
    "name_of_base",
    "open_saved_adapter",
    "or_user_error",
    "read_saved_adapter",
    "resolve_base",
    "resolve_spec",
    "write_folder",
]
