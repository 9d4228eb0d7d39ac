"""Process groups for timings of one process."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

from dora_fx.megatron.world import megatron_world


def quiet_world(device: str) -> AbstractContextManager[None]:
    """Megatron's groups of this process alone, which send nothing.

    Of gloo each of them has a thread that wakes a hundred times a second, which together take a part of a core.
    """
    return megatron_world(device, backend="fake" if device == "cpu" else None)
