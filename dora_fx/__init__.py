"""DoRA for Megatron-Core through a torch.compile backend; see README.md.

Public names are imported where they are first used. torch and Megatron-Core take seconds to import, and a program that
only asks for the version, or for the help of the command, needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dora_fx.quiet_imports import hide_what_is_not_missed
from dora_fx.version import __version__

if TYPE_CHECKING:
    from dora_fx.attach import (
        DoRA,
        active_adapter,
        adapter,
        adapter_names,
        add_adapter,
        config_overrides,
        delete_adapter,
        merge,
        merged,
        mixed,
        parameter_groups,
        set_adapter,
        unmerge,
    )
    from dora_fx.checkpoint import CheckpointError, load_bridge_checkpoint, load_checkpoint, save_checkpoint
    from dora_fx.compilation import compile_model
    from dora_fx.explanation import explain
    from dora_fx.hf import compare_merged, export_hf, import_hf, iter_adapter, iter_merged
    from dora_fx.modules import DoRALinear, ParallelLinearDoRAAdapter, disable_adapter, invalidate_norms
    from dora_fx.preflight import CheckError, CheckReport, check

__all__ = [
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "DoRA",
    "DoRALinear",
    "ParallelLinearDoRAAdapter",
    "__version__",
    "active_adapter",
    "adapter",
    "adapter_names",
    "add_adapter",
    "check",
    "compare_merged",
    "compile_model",
    "config_overrides",
    "delete_adapter",
    "disable_adapter",
    "explain",
    "export_hf",
    "import_hf",
    "invalidate_norms",
    "iter_adapter",
    "iter_merged",
    "load_bridge_checkpoint",
    "load_checkpoint",
    "merge",
    "merged",
    "mixed",
    "parameter_groups",
    "save_checkpoint",
    "set_adapter",
    "unmerge",
]

_HOMES = {
    "CheckError": "dora_fx.preflight",
    "CheckReport": "dora_fx.preflight",
    "CheckpointError": "dora_fx.checkpoint",
    "DoRA": "dora_fx.attach",
    "DoRALinear": "dora_fx.modules",
    "ParallelLinearDoRAAdapter": "dora_fx.modules",
    "active_adapter": "dora_fx.attach",
    "adapter": "dora_fx.attach",
    "adapter_names": "dora_fx.attach",
    "add_adapter": "dora_fx.attach",
    "check": "dora_fx.preflight",
    "compare_merged": "dora_fx.hf",
    "compile_model": "dora_fx.compilation",
    "config_overrides": "dora_fx.attach",
    "delete_adapter": "dora_fx.attach",
    "disable_adapter": "dora_fx.modules",
    "explain": "dora_fx.explanation",
    "export_hf": "dora_fx.hf",
    "import_hf": "dora_fx.hf",
    "invalidate_norms": "dora_fx.modules",
    "iter_adapter": "dora_fx.hf",
    "iter_merged": "dora_fx.hf",
    "load_bridge_checkpoint": "dora_fx.checkpoint",
    "load_checkpoint": "dora_fx.checkpoint",
    "merge": "dora_fx.attach",
    "merged": "dora_fx.attach",
    "mixed": "dora_fx.attach",
    "parameter_groups": "dora_fx.attach",
    "save_checkpoint": "dora_fx.checkpoint",
    "set_adapter": "dora_fx.attach",
    "unmerge": "dora_fx.attach",
}

hide_what_is_not_missed()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    # The next use finds it without a call of this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
