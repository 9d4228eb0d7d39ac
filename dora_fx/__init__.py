"""DoRA for Megatron-Core through a torch.compile backend; see README.md."""

from dora_fx.checkpoint import load_checkpoint, save_checkpoint
from dora_fx.config import DoRA
from dora_fx.failing_together import CheckpointError
from dora_fx.layers import DoRALinear, ParallelLinearDoRAAdapter, disable_adapter

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DoRA",
    "DoRALinear",
    "ParallelLinearDoRAAdapter",
    "__version__",
    "disable_adapter",
    "load_checkpoint",
    "save_checkpoint",
]
