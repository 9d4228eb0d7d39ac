"""Optimizer state in a checkpoint, with one interface for Megatron's optimizers and torch's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from dora_fx.checkpoint.manifest import StoredTensor
from dora_fx.checkpoint.megatron_optimizer import load_state as load_megatrons
from dora_fx.checkpoint.megatron_optimizer import set_step_counts, sharded_state_dict, step_counts
from dora_fx.checkpoint.optimizer_chain import fit_to_chain
from dora_fx.checkpoint.rank_steps import CheckpointError
from dora_fx.checkpoint.torch_optimizer import check_metadata, join_metadata, state_to_load, state_to_save
from dora_fx.checkpoint.torch_optimizer import load_state as load_torchs

# Key of the metadata of a torch optimizer; its shards are under "optimizer", as those of Megatron's are. By this key a
# load tells which of the two saved.
_METADATA = "torch_optimizer"


class OptimizerState:
    """The state of an optimizer as a part of a checkpoint of a model's adapters.

    Args:
        optimizer: Megatron's or torch's, None to leave optimizer state out.
        chunks: the model's, from `chunks_of`.
        adapter: the sharded state dict of their adapters, holding the parameters themselves.

    Raises:
        CheckpointError: it is neither, or it is a torch optimizer that keeps parts of its state on other ranks.
    """

    def __init__(self, optimizer: Any, chunks: Sequence[nn.Module], adapter: dict[str, Any]) -> None:
        is_torch = isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, ZeroRedundancyOptimizer)
        if optimizer is not None and not is_torch and not isinstance(optimizer, MegatronOptimizer):
            raise CheckpointError(
                f"optimizer: found a {type(optimizer).__module__}.{type(optimizer).__qualname__}, expected one of "
                "Megatron's (get_megatron_optimizer) or a torch.optim.Optimizer that holds the whole state of its "
                "parameters"
            )
        self._optimizer, self._chunks, self._adapter = optimizer, chunks, adapter
        self._is_torch = is_torch

    def to_save(self) -> tuple[dict[str, Any], Any]:
        """Return this rank's part of the state dict to save, and the metadata that the ranks exchange."""
        if self._optimizer is None:
            return {}, None
        if not self._is_torch:
            sharded = sharded_state_dict(self._optimizer, self._adapter, is_loading=False)
            return {"optimizer": sharded}, step_counts(self._optimizer, sharded)
        shards, metadata = state_to_save(self._optimizer, self._chunks)
        return {"optimizer": shards}, metadata

    def add_of_all_ranks(self, common: dict[str, Any], metadata_of_ranks: Sequence[Any]) -> None:
        """Add the optimizer's metadata to the part of a checkpoint that is not sharded.

        Args:
            common: this rank's part; rank 0's is saved.
            metadata_of_ranks: the second values of `to_save` on all ranks.

        Raises:
            CheckpointError: the ranks' optimizers differ.
        """
        for kind, name in ((dict, "a torch optimizer"), (list, "one of Megatron's optimizers")):
            number = sum(isinstance(metadata, kind) for metadata in metadata_of_ranks)
            if 0 < number < len(metadata_of_ranks):
                raise CheckpointError(
                    f"optimizer: found {name} on {number} of {len(metadata_of_ranks)} ranks, expected one on every rank"
                )
        if self._is_torch:
            common[_METADATA] = join_metadata(metadata_of_ranks)
        elif self._optimizer is not None:
            set_step_counts(self._optimizer, common["optimizer"], metadata_of_ranks)

    def to_load(self, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
        """Return the shards to read from a checkpoint that stores these tensors."""
        if self._optimizer is None:
            return {}
        if not self._is_torch:
            return {"optimizer": sharded_state_dict(self._optimizer, self._adapter, is_loading=True)}
        return {"optimizer": state_to_load(self._optimizer, self._chunks, stored)}

    def fit(self, common: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a checkpoint that is not sharded, with what it has of the optimizer fitted to this one."""
        if isinstance(self._optimizer, MegatronOptimizer) and _METADATA not in common:
            return {**common, "optimizer": fit_to_chain(self._optimizer, common["optimizer"])}
        return common

    def check(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless the state that was read belongs to such an optimizer. Nothing is changed."""
        if self._optimizer is None:
            return
        if self._is_torch != (_METADATA in state):
            saved = "a torch optimizer" if _METADATA in state else "one of Megatron's optimizers"
            raise CheckpointError(
                f"{directory}: found the state of {saved}, expected that of a {type(self._optimizer).__name__}; load "
                "it into the optimizer it was saved with"
            )
        if self._is_torch:
            try:
                check_metadata(self._optimizer, self._chunks, state[_METADATA])
            except CheckpointError as error:
                raise CheckpointError(f"{directory}: {error}") from error

    def load(self, state: Mapping[str, Any]) -> None:
        """Load state that passed `check` into the optimizer."""
        if self._optimizer is None:
            return
        if self._is_torch:
            # An optimizer without tensors, such as SGD, has no shards at all.
            tensors = state.get("optimizer", {})
            load_torchs(self._optimizer, self._chunks, state[_METADATA], tensors)
        else:
            load_megatrons(self._optimizer, state["optimizer"])
