"""Adapters as Megatron distributed checkpoints: written whole, checked before they are loaded, at any layout."""

from dora_fx.checkpoint.bridge import load_bridge_checkpoint
from dora_fx.checkpoint.checks import check_base, check_stored
from dora_fx.checkpoint.common import read_common
from dora_fx.checkpoint.contents import all_shards, model_contents
from dora_fx.checkpoint.directory import check_visible, open_checkpoint, previous_of
from dora_fx.checkpoint.manifest import ATTENTION_AND_MLP, MANIFEST, Manifest, check_file
from dora_fx.checkpoint.optimizer_state import OptimizerState
from dora_fx.checkpoint.plain import WholeAdapter, read_adapters
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.checkpoint.reader import CheckedReader
from dora_fx.checkpoint.save_and_load import load_checkpoint, save_checkpoint
from dora_fx.checkpoint.tensor_digests import add_digests, copy_digests, differing_copies, shard_digests

__all__ = [
    "ATTENTION_AND_MLP",
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
    "model_contents",
    "open_checkpoint",
    "previous_of",
    "read_adapters",
    "read_common",
    "save_checkpoint",
    "shard_digests",
]
