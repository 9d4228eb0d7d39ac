"""Process groups by name. Graphs and adapters hold names, since a group can be neither traced nor pickled."""

from __future__ import annotations

import torch
import torch.distributed as dist


def resolve_group(group_name: str) -> dist.ProcessGroup:
    """Return the process group of that name in this process.

    torch's functional collectives resolve their groups with the same function, which has no public name in torch 2.11
    to 2.15.

    Raises:
        RuntimeError: there is none; torch.distributed was shut down or initialized again since.
    """
    try:
        return torch._C._distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise RuntimeError(
            f"found no tensor-parallel process group {group_name!r}, expected the one that DoRA was attached under; "
            "was it destroyed?"
        ) from error


def group_size(group_name: str) -> int:
    """Return the number of ranks in the group; an empty name stands for a layer that is not parallel."""
    return resolve_group(group_name).size() if group_name else 1


def group_rank(group_name: str) -> int:
    """Return this process's rank in the group; 0 for an empty name."""
    return resolve_group(group_name).rank() if group_name else 0


def world_group() -> dist.ProcessGroup | None:
    """Return the group of all processes; None where torch.distributed is not initialized."""
    return dist.group.WORLD if dist.is_initialized() else None


def has_other_ranks(group: dist.ProcessGroup | None) -> bool:
    """Return whether the group has other processes to communicate with; torch's "fake" backend has none."""
    return group is not None and group.size() > 1 and dist.get_backend(group) != "fake"
