"""DoRA for Megatron-Core through a torch.compile backend; see README.md."""

from dora_fx.adapter import ParallelLinearDoRAAdapter
from dora_fx.checkpoint import CheckpointError, load_bridge_checkpoint, load_checkpoint, save_checkpoint
from dora_fx.config import DoRA
from dora_fx.hf import export_hf, import_hf
from dora_fx.layers import DoRALinear, disable_adapter, invalidate_norms
from dora_fx.merge import merge, unmerge

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DoRA",
    "DoRALinear",
    "ParallelLinearDoRAAdapter",
    "__version__",
    "disable_adapter",
    "export_hf",
    "import_hf",
    "invalidate_norms",
    "load_bridge_checkpoint",
    "load_checkpoint",
    "merge",
    "save_checkpoint",
    "unmerge",
]
