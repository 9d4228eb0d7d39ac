"""Named tensors from the ranks that hold them to all ranks, or to the first, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dora_fx.ranks import gather_objects, gather_objects_on_first_rank, has_other_ranks, world_group

T = TypeVar("T")


def to_first_rank(own: Mapping[str, T], group: dist.ProcessGroup | None) -> dict[str, T]:
    """Bring the named values of all ranks to the group's first rank; every rank of it calls it.

    Of the ranks that have the value of a name, which is the same on all of them, one sends it. The other ranks get an
    empty dict. A process by itself, whose group is None, gets its own.
    """
    if not has_other_ranks(group):
        return dict(own)
    senders, rank = _senders(gather_objects(list(own), group)), dist.get_rank(group)
    sent = {name: value for name, value in own.items() if senders[name] == rank}
    parts = gather_objects_on_first_rank(sent, group)
    return {name: value for part in parts for name, value in part.items()}


def send_units(units: Iterable[Mapping[str, Tensor]], *, every_rank: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of all ranks, unit by unit, on every rank or on global rank 0 alone.

    Args:
        units: as many on every rank, in the same order. A rank that has nothing of a unit has an empty one; of the
            ranks that have one of a name, which have the same, the first one's is sent.
        every_rank: else the other ranks get an empty stream; they take part all the same.

    Raises:
        RuntimeError: another rank is gone, or did not come within the group's timeout.
    """
    group, last = world_group(), "nothing"
    for unit in units:
        if not has_other_ranks(group):
            yield from unit.items()
            continue
        own = dict(unit)
        described = {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in own.items()}
        with _saying_where_it_broke_off(last):
            of_ranks = gather_objects(described, group)
        for name, source in _senders(of_ranks).items():
            shape, dtype, device_type = of_ranks[source][name]
            tensor = own[name] if dist.get_rank() == source else None
            with _saying_where_it_broke_off(last):
                received = _send(tensor, source, shape, dtype, device_type, every_rank)
            last = name
            if received is not None:
                yield name, received


def _senders(names_of_ranks: Sequence[Iterable[str]]) -> dict[str, int]:
    """Return the first rank that has each name, in the order of the ranks.

    Ranks of other pipeline stages have other layers, and those of other expert-parallel ranks other experts.
    """
    senders: dict[str, int] = {}
    for rank, names in enumerate(names_of_ranks):
        for name in names:
            senders.setdefault(name, rank)
    return senders


@contextmanager
def _saying_where_it_broke_off(last: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # A process that died closes its connections at once; of one that does not come, the group's timeout tells.
        raise RuntimeError(
            f"the stream of weights broke off after {last}: another rank is gone, or did not take its stream to the "
            f"end ({error})"
        ) from error


def _send(
    tensor: Tensor | None, source: int, shape: torch.Size, dtype: torch.dtype, device_type: str, every_rank: bool
) -> Tensor | None:
    rank = dist.get_rank()
    if not every_rank and rank not in (source, 0):
        return None
    # NCCL sends nothing but what is on its device.
    on_cuda = device_type == "cuda" or dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device(device_type)
    sent = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device)
    if every_rank:
        dist.broadcast(sent, src=source)
    elif source != 0:
        if rank == source:
            dist.send(sent, dst=0)
            return None
        dist.recv(sent, src=source)
    return sent.to(device_type)
