"""Data-parallel wrappers around a model whose parameters change."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from dora_fx.megatron.live_objects import live_objects

_DATA_PARALLEL = (DistributedDataParallel, TorchDDP)


def rebuild_gradient_buffers(chunks: Iterable[nn.Module]) -> None:
    """Give Megatron's data-parallel wrappers of the chunks buffers and hooks for what is trainable now.

    They allocate them once, at construction; adapters attached later would never be synchronised.
    """
    for wrapper in data_parallel_around(chunks):
        if isinstance(wrapper, DistributedDataParallel):
            _construct_again(wrapper)


def _construct_again(wrapper: Any) -> None:
    """Call the constructor of Megatron's wrapper with what it was called with, in place.

    It has no method that allocates its buffers again (read in megatron-core 0.16 to 0.19). It does not keep its
    arguments, but attributes that follow from them: groups under these names, and no bucket size where buckets were
    turned off.
    """
    groups = ProcessGroupCollection()
    for name in ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp", "inter_dist_opt", "tp", "pp", "ep"):
        setattr(groups, name, getattr(wrapper, f"{name}_group", None))
    wrapper.__init__(
        config=wrapper.config,
        ddp_config=wrapper.ddp_config,
        module=wrapper.module,
        disable_bucketing=wrapper.bucket_size is None,
        pg_collection=groups,
    )


def is_parameter_gather_hook(hook: object) -> bool:
    """Return whether a forward pre-hook is that of Megatron's wrapper which waits for the parameters of one module.

    It is a function inside a private method, and has nothing but that name to be known by (megatron-core 0.16 to 0.19).
    """
    return getattr(hook, "__qualname__", "").startswith("DistributedDataParallel._make_forward_pre_hook")


def data_parallel_around(
    chunks: Iterable[nn.Module], classes: tuple[type[nn.Module], ...] = _DATA_PARALLEL
) -> list[nn.Module]:
    """Megatron's and torch's DistributedDataParallel objects of this process that hold a part of one of the chunks.

    A caller may pass a model out of such a wrapper and train through the wrapper, to which the model has no reference.
    So where there is more than one rank, wrappers are searched among all objects of the process.

    Args:
        chunks: the model, or its virtual pipeline chunks.
        classes: of the wrappers that are meant, one of the two or both.
    """
    parts = dict.fromkeys(module for chunk in chunks for module in chunk.modules())
    everywhere = data_parallel_objects(classes) if dist.is_initialized() and dist.get_world_size() > 1 else []
    wrappers = [found for found in dict.fromkeys([*parts, *everywhere]) if isinstance(found, classes)]
    return [wrapper for wrapper in wrappers if any(module in parts for module in wrapper.modules())]


def reduces_all(wrapper: Any, parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether a data-parallel wrapper reduces the gradients of all these parameters over its ranks.

    Neither class has a public list of them (read in torch 2.13 to 2.15 and megatron-core 0.16 to 0.19).
    """
    reduced = wrapper._module_parameters if isinstance(wrapper, TorchDDP) else wrapper.param_to_bucket_group
    known = set(map(id, reduced))
    return all(id(parameter) in known for parameter in parameters)


def check_joins_replicas(wrapper: Any, groups: Iterable[tuple[str, dist.ProcessGroup]]) -> None:
    """Raise ValueError if torch's wrapper joins ranks that hold other parts of a model.

    It makes the ranks' parameters equal when it is constructed, frozen ones too, and then their gradients.

    Args:
        wrapper: torch's DistributedDataParallel.
        groups: of the ranks that share the model out, with the kind of their parallelism.
    """
    joined = set(dist.get_process_group_ranks(wrapper.process_group)) - {dist.get_rank()}
    for kind, group in groups:
        if parts := sorted(joined.intersection(dist.get_process_group_ranks(group))):
            raise ValueError(
                "torch.nn.parallel.DistributedDataParallel: found one that joins this rank with rank "
                f"{parts[0]}, which holds another {kind}-parallel part of the model, expected Megatron's "
                "DistributedDataParallel, or process_group=parallel_state.get_data_parallel_group() where no experts "
                "are spread over ranks. It has made frozen weights equal that differ: build the model again"
            )


def data_parallel_objects(classes: tuple[type[nn.Module], ...] = _DATA_PARALLEL) -> list[nn.Module]:
    """Megatron's and torch's DistributedDataParallel objects of this process, or those of one of them."""
    if not live_objects(classes):
        return []
    # A wrapper without users may still be there: reference cycles keep it until the collector runs.
    gc.collect()
    return live_objects(classes)
