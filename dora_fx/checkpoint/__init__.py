"""Saves and loads adapters and optimizer state as Megatron distributed checkpoints, at any parallel layout.

A save is atomic. A load checks everything before it changes the model. `read_adapters` reads without a model, and
`load_bridge_checkpoint` reads what Megatron-Bridge saved.
"""

from dora_fx.checkpoint.bridge import load_bridge_checkpoint
from dora_fx.checkpoint.checked_reader import CheckedReader
from dora_fx.checkpoint.common_state import read_common
from dora_fx.checkpoint.directory import check_visible, open_checkpoint, previous_of
from dora_fx.checkpoint.load_checks import check_base, check_stored
from dora_fx.checkpoint.manifest import ATTENTION_AND_MLP, EXPERTS, MANIFEST, Manifest, check_file
from dora_fx.checkpoint.optimizer_state import OptimizerState
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.checkpoint.save_and_load import load_checkpoint, save_checkpoint
from dora_fx.checkpoint.sharded_model import all_shards, sharded_model_of
from dora_fx.checkpoint.tensor_digests import add_digests, copy_digests, differing_copies, shard_digests
from dora_fx.checkpoint.whole_adapters import WholeAdapter, read_adapters

__all__ = [
    "ATTENTION_AND_MLP",
    "EXPERTS",
    "MANIFEST",
    "CheckedReader",
    "CheckpointError",
    "Manifest",
    "OptimizerState",
    "WholeAdapter",
    "add_digests",
    "all_shards",
    "check_base",
    "check_file",
    "check_stored",
    "check_visible",
    "copy_digests",
    "differing_copies",
    "load_bridge_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "previous_of",
    "read_adapters",
    "read_common",
    "save_checkpoint",
    "shard_digests",
    "sharded_model_of",
]
