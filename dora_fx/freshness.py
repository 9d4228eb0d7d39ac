"""Whether a tensor that was worked out from others is still theirs.

A value is worked out from its sources once and then reused while they stay the same. A source that was written in
place, or lies in other memory, says so by itself. An optimizer's step need not: Megatron's mixed-precision and
distributed optimizers write parameters through `.data` and through flat buffers, which neither moves a parameter nor
bumps its version. So what follows from trained tensors is recorded with `num_optimizer_steps` as a constant. Any step
of any optimizer counts there, for what it writes to may be a copy that is copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


class _Source(NamedTuple):
    """A tensor as it was: its memory, kept from being mistaken for later memory at the same address, and version."""

    storage: StorageWeakRef
    address: int
    version: int

    def is_still(self, tensor: torch.Tensor) -> bool:
        return (
            not tensor.is_inference()
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
            and tensor.untyped_storage()._cdata == self.storage.cdata
        )


class _Record(NamedTuple):
    """What a value was worked out from; the value itself is a source, as somebody may write into it."""

    sources: tuple[_Source, ...]
    constants: tuple[Any, ...]


_records = WeakTensorKeyDictionary()
_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def num_optimizer_steps() -> int:
    """How many steps all optimizers of this process took."""
    return _optimizer_steps


def is_fresh(value: torch.Tensor, sources: Sequence[torch.Tensor], *constants: Any) -> bool:
    """Whether `value` was recorded with these sources and constants, and nothing can have changed them since."""
    record = _records.get(value)
    return (
        record is not None
        and record.constants == constants
        and len(record.sources) == 1 + len(sources)
        and all(map(_Source.is_still, record.sources, (value, *sources)))
    )


def record_fresh(value: torch.Tensor, sources: Sequence[torch.Tensor], *constants: Any) -> None:
    """Note that `value` holds what follows from the sources and constants as they are."""
    tensors = (value, *sources)
    if any(tensor.is_inference() for tensor in tensors):
        # Tensors made in inference mode have no version, so nobody could tell.
        _records.pop(value, None)
        return
    described = (_Source(StorageWeakRef(t.untyped_storage()), t.data_ptr(), t._version) for t in tensors)
    _records[value] = _Record(tuple(described), constants)
