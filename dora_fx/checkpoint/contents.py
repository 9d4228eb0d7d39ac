"""The contents of a checkpoint: adapter shards, the settings of the sites, and shards of their base."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import nn

from dora_fx.attach import adapted_layers
from dora_fx.checkpoint.manifest import (
    ATTENTION_AND_MLP,
    NORM_OF_INPUT,
    OTHER_HYBRID,
    SiteSettings,
    StoredTensor,
)
from dora_fx.checkpoint.rank_steps import CheckpointError, failing_together, gather
from dora_fx.megatron import check_unsharded, hybrid_pattern_maybe, is_attention_and_mlp, unwrap
from dora_fx.modules import DoRALinear, TorchLinear

# Megatron's prefix of the tensors that an optimizer keeps for a parameter.
_OPTIMIZER_STATE = re.compile(r"^optimizer\.state\.\w+\.")


@dataclass(frozen=True)
class ModelContents:
    """A model's part of a checkpoint, as this rank holds it.

    Attributes:
        non_homogeneous_layers: Megatron's metadata flag that the shards were described with.
        adapter: chunk -> state-dict key -> shard that holds the parameter itself.
        sites: key of an adapted layer -> DoRA's settings, of all ranks.
        unpadded: key of a tensor, or name of a parameter in the whole model -> shape of one layer's without what pads
            the base to a size that divides by the number of ranks, of all ranks.
        base: shards of the adapted layers' base weights and biases, and of the norms of their inputs.
    """

    non_homogeneous_layers: bool
    adapter: dict[str, dict[str, Any]]
    sites: dict[str, SiteSettings]
    unpadded: dict[str, tuple[int, ...]]
    base: list[ShardedTensor]

    def stored_tensors(self, shards_of_ranks: Iterable[Iterable[ShardedBase]]) -> dict[str, StoredTensor]:
        """The whole tensors, by key, that the shards of all ranks are parts of, without padding."""
        found = {}
        for shard in chain.from_iterable(shards_of_ranks):
            if isinstance(shard, ShardedTensor):
                own = self.unpadded[_OPTIMIZER_STATE.sub("", shard.key)]
                layers = tuple(shard.global_shape)[: len(shard.global_shape) - len(own)]
                found[shard.key] = StoredTensor(layers + own, str(shard.dtype).removeprefix("torch."))
        return dict(sorted(found.items()))


def model_contents(chunks: Sequence[nn.Module], non_homogeneous_layers: bool | None = None) -> ModelContents:
    """Describe a model's pipeline chunks. Every rank calls it.

    Args:
        chunks: bare or wrapped, as `wrappers.chunks_of` returns them.
        non_homogeneous_layers: as the checkpoint to load says; None to join the layers of a kind in one tensor if
            every layer has an adapter of the same settings, as Megatron does by default.

    Raises:
        CheckpointError: the model has no adapters, or Megatron's layers without Megatron's `sharded_state_dict`.
    """
    # Keys have numbers whatever the flag says where Megatron does not describe the model, and in a HybridModel.
    has_layers_in_front = all(
        hasattr(unwrap(chunk), "sharded_state_dict") and hybrid_pattern_maybe(chunk) is None for chunk in chunks
    )
    flags = (False, True) if has_layers_in_front else (True,)
    for flag in flags if non_homogeneous_layers is None else (non_homogeneous_layers,):
        with failing_together("describing the adapters"):
            adapter, sites, shapes, base = _describe_chunks(chunks, flag)
            shards = [shard.without_data() for shard in all_shards(adapter)]
        everyone = zip(*gather((shards, sites, shapes), "describing the adapters"), strict=True)
        shards, sites, shapes = (list(chain.from_iterable(of_ranks)) for of_ranks in everyone)
        found = ModelContents(flag, adapter, dict(sites), dict(shapes), base)
        unlike = _with_several_values(sites) + _with_several_values(shapes) + _not_covered(shards)
        if not unlike:
            break
    if not found.sites:
        raise CheckpointError("the model has no DoRA adapters; attach them with DoRA(...)(model) first")
    if unlike and non_homogeneous_layers is not None:
        raise CheckpointError(
            f"{unlike[0]}: the checkpoint has an adapter of the same dim and alpha in every layer, the model has not; "
            "attach DoRA to all layers alike"
        )
    return found


def all_shards(state: Any) -> list[ShardedBase]:
    """The shards in a nested state dict, with those that factories make of a tensor in the tensor's place."""
    shards: list[ShardedBase] = []
    for value in nested_values(state) if isinstance(state, dict | list) else [state]:
        if isinstance(value, ShardedTensorFactory):
            shards += all_shards(value.build())
        elif isinstance(value, ShardedBase):
            shards.append(value)
    return shards


def layout_of_world(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sizes of Megatron's groups by their usual names, sequence parallelism, and the kind of a HybridModel."""
    config: Any = getattr(unwrap(chunks[0]), "config", None)
    pattern = hybrid_pattern_maybe(chunks[0])
    hybrid = {} if pattern is None else {"hybrid": ATTENTION_AND_MLP if is_attention_and_mlp(pattern) else OTHER_HYBRID}
    return hybrid | {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": len(chunks),
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "sequence_parallel": bool(getattr(config, "sequence_parallel", False)),
    }


Description = tuple[
    dict[str, dict[str, Any]], list[tuple[str, SiteSettings]], list[tuple[str, tuple[int, ...]]], list[ShardedTensor]
]


def _describe_chunks(chunks: Sequence[nn.Module], non_homogeneous_layers: bool) -> Description:
    adapter: dict[str, dict[str, Any]] = {}
    sites: list[tuple[str, SiteSettings]] = []
    shapes: list[tuple[str, tuple[int, ...]]] = []
    base: list[ShardedTensor] = []
    for index, chunk in enumerate(chunks):
        inner: Any = unwrap(chunk)
        for _, named in adapted_layers([chunk]):
            check_unsharded(named.whole_path, named.module)
        metadata = {"non_homogeneous_layers": non_homogeneous_layers}
        if hasattr(inner, "sharded_state_dict"):
            shards: dict[str, Any] = inner.sharded_state_dict(metadata=metadata)
        else:
            shards = _shards_of_whole_layers(chunk, metadata)
        adapter["model" if len(chunks) == 1 else f"model{index}"] = {
            key: shard for key, shard in shards.items() if ".adapter." in key and not key.endswith("_extra_state")
        }
        for _, (path, whole_path, site) in adapted_layers([chunk]):
            for name, placement in site.adapter.placements.items():
                key = all_shards(shards[f"{path}.adapter.{name}"])[0].key
                # The second is the key that a torch optimizer's state has.
                shapes += [(key, placement.shape), (f"{whole_path}.adapter.{name}", placement.shape)]
            sites.append((key.partition(".adapter.")[0], _settings(site)))
            own = [shards[f"{path}.{part}"] for part in ("weight", "bias") if f"{path}.{part}" in shards]
            base += [shard for shard in all_shards(own) if isinstance(shard, ShardedTensor)]
        base += _input_norms(shards, {key for key, _ in sites})
    return adapter, sites, shapes, base


def _input_norms(shards: dict[str, Any], sites: Collection[str]) -> list[ShardedTensor]:
    """The norms before the adapted layers, which are the layers' own in some specs and have the same keys in all."""
    return [
        shard
        for shard in all_shards(list(shards.values()))
        if isinstance(shard, ShardedTensor)
        and NORM_OF_INPUT in shard.key
        and shard.key.split(NORM_OF_INPUT)[0] in sites
    ]


def _shards_of_whole_layers(chunk: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """The adapted layers of a model that Megatron knows nothing of, each by its path and whole on every rank."""
    shards: dict[str, Any] = {}
    for _, named in adapted_layers([chunk]):
        if named.module.kind is not TorchLinear:
            raise CheckpointError(
                f"{type(unwrap(chunk)).__name__} has no sharded_state_dict, and {named.path} is a "
                f"{type(named.module.to_wrap).__name__}; expected a Megatron model such as GPTModel, or adapters on "
                "layers of class Linear alone"
            )
        shards |= named.module.sharded_state_dict(f"{named.path}.", (), dict(metadata))
    return shards


def _settings(site: DoRALinear) -> SiteSettings:
    adapter = site.adapter
    return SiteSettings(
        adapter.dim, float(adapter.alpha), float(adapter.scaling), float(adapter.dropout), adapter.use_rslora
    )


def _with_several_values(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """The keys that come with more than one value."""
    values: dict[str, set[Any]] = {}
    for key, value in pairs:
        values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _not_covered(shards: Iterable[ShardedTensor]) -> list[str]:
    """The keys of which the shards together are not as large as the whole tensor."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for shard in shards:
        place = (shard.key, tuple(shard.global_shape))
        counts[place] = counts.get(place, 0) + is_main_replica(shard.replica_id) * math.prod(shard.local_shape)
    return [key for (key, shape), count in counts.items() if count != math.prod(shape)]
