"""Process groups by name, as graphs and adapters carry them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def resolve_group(group_name: str) -> dist.ProcessGroup:
    """Return the process group of that name in this process.

    torch's own functional collectives look their groups up with the same function, which has no public name (read in
    torch 2.11 to 2.15).

    Raises:
        RuntimeError: there is none, because torch.distributed was shut down or started anew since.
    """
    try:
        return torch._C._distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise RuntimeError(
            f"found no tensor-parallel process group {group_name!r}, expected the one that DoRA was attached under; "
            "was it destroyed?"
        ) from error


def group_size(group_name: str) -> int:
    """Number of ranks in the group; an empty name stands for a layer that is not parallel."""
    return resolve_group(group_name).size() if group_name else 1


def group_rank(group_name: str) -> int:
    """This process's rank in the group."""
    return resolve_group(group_name).rank() if group_name else 0


def world_group() -> dist.ProcessGroup | None:
    """All processes, None where torch.distributed is not started."""
    return dist.group.WORLD if dist.is_initialized() else None


def has_other_ranks(group: dist.ProcessGroup | None) -> bool:
    """Return whether the group has other processes to talk to; torch's "fake" backend has none."""
    return group is not None and group.size() > 1 and dist.get_backend(group) != "fake"
