"""The shards of a model that a checkpoint saves or is compared with: adapters, their settings, and their base."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

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
from dora_fx.checkpoint.rank_steps import CheckpointError, collective_step, gather
from dora_fx.megatron import check_unsharded, hybrid_pattern_maybe, is_attention_and_mlp, unwrap
from dora_fx.modules import NUMBERED_EXPERTS, DoRALinear, GroupedDoRALinear, TorchLinear, quantised_weight_maybe

# Megatron's prefix of the tensors that an optimizer keeps for a parameter.
_OPTIMIZER_STATE = re.compile(r"^optimizer\.state\.\w+\.")


class Keys(NamedTuple):
    """What the keys of a checkpoint have in place of an axis of the tensors: numbers of layers, numbers of experts.

    The first is Megatron's metadata flag of that name.
    """

    non_homogeneous_layers: bool
    numbered_experts: bool


@dataclass(frozen=True)
class ShardedModel:
    """A model as a checkpoint sees it: this rank's shards, and the settings and shapes of all ranks.

    Attributes:
        keys: what the shards' keys have.
        adapter: chunk -> state-dict key -> this rank's shard, which holds the parameter itself.
        sites: key of an adapted layer -> DoRA's settings, over all ranks.
        unpadded: key of a tensor, or name of a parameter in the whole model -> shape within one layer, without the
            padding that makes the base divisible by the number of ranks; over all ranks.
        base: this rank's shards of the adapted layers' weights and biases, and of the norms of their inputs.
    """

    keys: Keys
    adapter: dict[str, dict[str, Any]]
    sites: dict[str, SiteSettings]
    unpadded: dict[str, tuple[int, ...]]
    base: list[ShardedTensor]

    def stored_tensors(self, shards_of_ranks: Iterable[Iterable[ShardedBase]]) -> dict[str, StoredTensor]:
        """Return shape and dtype, without padding, of the whole tensors that the shards of all ranks are parts of."""
        tensors = {}
        for shard in chain.from_iterable(shards_of_ranks):
            if isinstance(shard, ShardedTensor):
                own = self.unpadded[_OPTIMIZER_STATE.sub("", shard.key)]
                layers = tuple(shard.global_shape)[: len(shard.global_shape) - len(own)]
                tensors[shard.key] = StoredTensor(layers + own, str(shard.dtype).removeprefix("torch."))
        return dict(sorted(tensors.items()))


def sharded_model_of(chunks: Sequence[nn.Module], keys: Keys | None = None) -> ShardedModel:
    """Collect the shards and settings of a model's pipeline chunks. Every rank calls it.

    Args:
        chunks: bare or wrapped, from `chunks_of`.
        keys: of the checkpoint to load. None for a save: the layers of a kind are then one tensor if every layer has an
            adapter of the same settings, as Megatron does by default, and so are the experts of a layer.

    Raises:
        CheckpointError: the model has no adapters, or has Megatron's layers without a `sharded_state_dict`.
    """
    # A HybridModel, and a model without a `sharded_state_dict`, have layer numbers in their keys whatever the flag
    # says.
    has_layers_in_front = all(
        hasattr(unwrap(chunk), "sharded_state_dict") and hybrid_pattern_maybe(chunk) is None for chunk in chunks
    )
    layers = (False, True) if has_layers_in_front else (True,)
    possible = [Keys(flag, numbered) for numbered in (False, True) for flag in layers]
    for tried in possible if keys is None else (keys,):
        with collective_step("collecting the adapters"):
            adapter, sites, shapes, base = _collect_chunks(chunks, tried)
            shards = [shard.without_data() for shard in all_shards(adapter)]
        everyone = zip(*gather((shards, sites, shapes), "collecting the adapters"), strict=True)
        shards, sites, shapes = (list(chain.from_iterable(of_ranks)) for of_ranks in everyone)
        sharded = ShardedModel(tried, adapter, dict(sites), dict(shapes), base)
        # Layers can share a tensor only if they have the same shapes and settings, and if none of them lacks an
        # adapter. A rank cannot tell alone: the layers that differ may be on another pipeline stage.
        differing = _with_several_values(sites) + _with_several_values(shapes) + _not_covered(shards)
        if not differing:
            break
    if not sharded.sites:
        raise CheckpointError("the model has no DoRA adapters; attach them with DoRA(...)(model) first")
    if differing and keys is not None:
        raise CheckpointError(
            f"{differing[0]}: found adapters that differ between layers or experts, or some without one, expected one "
            "of the same dim and alpha in each, as the checkpoint has; attach DoRA to all alike"
        )
    return sharded


def all_shards(state: Any) -> list[ShardedBase]:
    """Return the shards in a nested state dict; a factory is replaced by the shards that it builds."""
    shards: list[ShardedBase] = []
    for value in nested_values(state) if isinstance(state, dict | list) else [state]:
        if isinstance(value, ShardedTensorFactory):
            shards += all_shards(value.build())
        elif isinstance(value, ShardedBase):
            shards.append(value)
    return shards


def layout_of_world(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the sizes of Megatron's groups by their usual names, sequence parallelism, and a HybridModel's kind."""
    config: Any = getattr(unwrap(chunks[0]), "config", None)
    pattern = hybrid_pattern_maybe(chunks[0])
    hybrid = {} if pattern is None else {"hybrid": ATTENTION_AND_MLP if is_attention_and_mlp(pattern) else OTHER_HYBRID}
    return hybrid | {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": len(chunks),
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": bool(getattr(config, "sequence_parallel", False)),
    }


_Collected = tuple[
    dict[str, dict[str, Any]], list[tuple[str, SiteSettings]], list[tuple[str, tuple[int, ...]]], list[ShardedTensor]
]


def _collect_chunks(chunks: Sequence[nn.Module], keys: Keys) -> _Collected:
    """Return this rank's adapter shards, the settings and shapes by key, and the shards of the base."""
    adapter: dict[str, dict[str, Any]] = {}
    sites: list[tuple[str, SiteSettings]] = []
    shapes: list[tuple[str, tuple[int, ...]]] = []
    base: list[ShardedTensor] = []
    for index, chunk in enumerate(chunks):
        inner: Any = unwrap(chunk)
        for _, named in adapted_layers([chunk]):
            check_unsharded(named.whole_path, named.module)
        metadata = {"non_homogeneous_layers": keys.non_homogeneous_layers, NUMBERED_EXPERTS: keys.numbered_experts}
        if hasattr(inner, "sharded_state_dict"):
            shards: dict[str, Any] = inner.sharded_state_dict(metadata=metadata)
        else:
            shards = _shards_of_whole_layers(chunk, metadata)
        # Megatron's own names of chunks. Transformer Engine's layers add `_extra_state`, which is FP8's and not ours.
        adapter["model" if len(chunks) == 1 else f"model{index}"] = {
            key: shard for key, shard in shards.items() if ".adapter." in key and not key.endswith("_extra_state")
        }
        for _, (path, whole_path, site) in adapted_layers([chunk]):
            for name, placement in site.adapter.placements.items():
                key = all_shards(shards[f"{path}.adapter.{name}"])[0].key
                # Experts of a grouped layer are to a checkpoint what layers are, an axis in front.
                shape = placement.shape[1:] if isinstance(site, GroupedDoRALinear) else placement.shape
                # A torch optimizer's state is stored under the second name.
                shapes += [(key, shape), (f"{whole_path}.adapter.{name}", shape)]
            sites.append((key.partition(".adapter.")[0], _settings(site)))
            names = (f"{path}.{part}" for part in _base_names(site))
            # What is stored beside the first tensor of a quantised weight has numbers.
            beside = itertools.takewhile(shards.__contains__, (f"{path}.weight.{n}" for n in itertools.count(1)))
            own = [shards[key] for key in (*names, *beside) if key in shards]
            base += [shard for shard in all_shards(own) if isinstance(shard, ShardedTensor)]
        base += _input_norms(shards, {key for key, _ in sites})
    return adapter, sites, shapes, base


def _base_names(site: DoRALinear) -> list[str]:
    numbers = [""] if site.expert_weights is None else range(len(site.expert_weights))
    return [f"{part}{number}" for number in numbers for part in ("weight", "bias")]


def _input_norms(shards: dict[str, Any], sites: Collection[str]) -> list[ShardedTensor]:
    """Return the norms of the adapted layers' inputs.

    In some specs they are modules before the layers, in others the layers' own parameters; the keys are the same.
    """
    return [
        shard
        for shard in all_shards(list(shards.values()))
        if isinstance(shard, ShardedTensor)
        and NORM_OF_INPUT in shard.key
        and shard.key.split(NORM_OF_INPUT)[0] in sites
    ]


def _shards_of_whole_layers(chunk: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return shards of the adapted layers of a model without `sharded_state_dict`; every rank holds them whole."""
    shards: dict[str, Any] = {}
    for _, named in adapted_layers([chunk]):
        if not issubclass(named.module.kind, TorchLinear) and quantised_weight_maybe(named.module.to_wrap) is None:
            raise CheckpointError(
                f"{type(unwrap(chunk)).__name__} has no sharded_state_dict, and {named.path} is a "
                f"{type(named.module.to_wrap).__name__}; expected a Megatron model such as GPTModel, or adapters on "
                "layers of class Linear, or quantised ones, alone"
            )
        shards |= named.module.sharded_state_dict(f"{named.path}.", (), dict(metadata))
    return shards


def _settings(site: DoRALinear) -> SiteSettings:
    adapter = site.adapter
    return SiteSettings(
        adapter.dim, float(adapter.alpha), float(adapter.scaling), float(adapter.dropout), adapter.use_rslora
    )


def _with_several_values(pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the keys that come with more than one value."""
    values: dict[str, set[Any]] = {}
    for key, value in pairs:
        values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _not_covered(shards: Iterable[ShardedTensor]) -> list[str]:
    """Return the keys whose shards together have fewer or more elements than the whole tensor.

    Such is a tensor of all layers of which some layers have no adapter.
    """
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for shard in shards:
        place = (shard.key, tuple(shard.global_shape))
        counts[place] = counts.get(place, 0) + is_main_replica(shard.replica_id) * math.prod(shard.local_shape)
    return [key for (key, shape), count in counts.items() if count != math.prod(shape)]
