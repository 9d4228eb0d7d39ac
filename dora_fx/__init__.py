"""DoRA for Megatron-Core through a torch.compile backend; see README.md."""

from dora_fx.attach.config import DoRA
from dora_fx.attach.learning_rates import config_overrides, parameter_groups
from dora_fx.attach.merge import merge, merged, unmerge
from dora_fx.checkpoint import CheckpointError, load_bridge_checkpoint, load_checkpoint, save_checkpoint
from dora_fx.compilation import compile_model
from dora_fx.hf import compare_merged, export_hf, import_hf, iter_adapter, iter_merged
from dora_fx.modules.adapter import ParallelLinearDoRAAdapter
from dora_fx.modules.dora_linear import DoRALinear, disable_adapter, invalidate_norms
from dora_fx.version import __version__

__all__ = [
    "CheckpointError",
    "DoRA",
    "DoRALinear",
    "ParallelLinearDoRAAdapter",
    "__version__",
    "compare_merged",
    "compile_model",
    "config_overrides",
    "disable_adapter",
    "export_hf",
    "import_hf",
    "invalidate_norms",
    "iter_adapter",
    "iter_merged",
    "load_bridge_checkpoint",
    "load_checkpoint",
    "merge",
    "merged",
    "parameter_groups",
    "save_checkpoint",
    "unmerge",
]
