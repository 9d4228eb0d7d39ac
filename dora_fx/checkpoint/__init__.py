"""Adapters as Megatron distributed checkpoints: written whole, checked before they are loaded, at any layout."""

from dora_fx.checkpoint.bridge import load_bridge_checkpoint
from dora_fx.checkpoint.failing_together import CheckpointError
from dora_fx.checkpoint.save_and_load import load_checkpoint, save_checkpoint

__all__ = ["CheckpointError", "load_bridge_checkpoint", "load_checkpoint", "save_checkpoint"]
