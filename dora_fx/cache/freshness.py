"""Tell whether a cached value is up to date: whether the tensors that it was computed from are what they were.

A tensor that moved, or that was written in a way that PyTorch counts, shows in its address and version counter; its
bits then say whether a value changed at all. Writes through `.data`, by NCCL and in other ways past the counter show in
the bits alone (`fingerprint.py`):

    on a CPU            the bits are compared at every check, before the value is used
    on an accelerator   they are compared without waiting for the device. A later check reads the answer, and raises
                        StaleParametersError where a value was used that was out of date

After an optimizer's step the values of everything that it trains are out of date, whatever it writes through. So no
tensor is compared then: each value is recorded with the number of steps that may have changed its adapter
(`step_counts.py`), and is out of date after the next one. Every rank counts the same steps, and so all ranks invalidate
the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from dora_fx.cache.fingerprint import digest, fingerprint, fingerprints, sampled_rows
from dora_fx.cache.step_counts import StepCount, step_count_of


class StaleParametersError(RuntimeError):
    """A cached norm or factor that was used does not follow from the parameters."""


class Places(NamedTuple):
    """The memory of several tensors, and how often PyTorch counted a write into each.

    Attributes:
        addresses: of all tensors, in their order, as are the others.
        sizes: in bytes.
        storages: torch's numbers for them.
        versions: the counters of writes.
        references: weak ones to the storages, which keep their numbers from being given to later ones. They tell later
            memory at the same address from this.
    """

    addresses: list[int]
    sizes: list[int]
    storages: list[int]
    versions: list[int]
    references: tuple[StorageWeakRef, ...]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Places:
        storages = [tensor.untyped_storage() for tensor in tensors]
        return cls(
            [tensor.data_ptr() for tensor in tensors],
            [tensor.nbytes for tensor in tensors],
            [storage._cdata for storage in storages],
            versions_of(tensors),
            tuple(map(StorageWeakRef, storages)),
        )

    def are_still(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the tensors lie there, and no write into them was counted."""
        return self.hold(tensors) and versions_of(tensors) == self.versions

    def hold(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether the tensors lie there.

        List by list: this runs in front of every call of a model.
        """
        return (
            [tensor.data_ptr() for tensor in tensors] == self.addresses
            and [tensor.nbytes for tensor in tensors] == self.sizes
            and [tensor.untyped_storage()._cdata for tensor in tensors] == self.storages
        )


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the version counters of tensors; -1 for one that was made in inference mode, where reading it raises."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


class Snapshot(NamedTuple):
    """Tensors at one time: their memory, shapes and bits.

    Attributes:
        bits: their `digest` on a CPU, their `fingerprint` on an accelerator.
        sampled: the bits are those of their `sampled_rows` alone.
    """

    places: Places
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]
    bits: int | torch.Tensor
    sampled: bool

    @classmethod
    def of_each(cls, groups: Sequence[Sequence[torch.Tensor]], *, sampled: Sequence[bool]) -> list[Snapshot]:
        """Take a snapshot of each group; nothing waits for a device, and each gets one run of launches for all groups.

        Args:
            sampled: of each group.
        """
        bits: list[int | torch.Tensor] = [0] * len(groups)
        on_device: dict[torch.device, list[int]] = {}
        for index, (tensors, part) in enumerate(zip(groups, sampled, strict=True)):
            if all(tensor.is_cpu for tensor in tensors):
                bits[index] = digest(tensors, sampled=part)
            else:
                on_device.setdefault(tensors[0].device, []).append(index)
        for indices in on_device.values():
            found = fingerprints([_compared(groups[index], sampled[index]) for index in indices])
            for index, each in zip(indices, found.unbind(), strict=True):
                bits[index] = each
        return [
            cls(Places.of(tensors), _kinds(tensors), own, part)
            for tensors, own, part in zip(groups, bits, sampled, strict=True)
        ]

    def in_same_memory(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these are the tensors that it was taken of, and PyTorch counted no write into them."""
        return self.places.are_still(tensors)

    def has_same_bits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these tensors, wherever they are, hold the same bits; waits for the device."""
        if self.kinds != _kinds(tensors):
            return False
        if isinstance(self.bits, int):
            return self.bits == digest((tensor.cpu() for tensor in tensors), sampled=self.sampled)
        return bool(self.bits.to(tensors[0].device) == fingerprint(_compared(tensors, self.sampled)))


def _kinds(tensors: Sequence[torch.Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _compared(tensors: Sequence[torch.Tensor], sampled: bool) -> Sequence[torch.Tensor]:
    """Return the tensors, or the rows of them, whose bits are compared."""
    return [sampled_rows(tensor) for tensor in tensors] if sampled else tensors


class CacheEntry(NamedTuple):
    """A cached value, and others that are computed with it, with the tensors that they are computed from.

    Attributes:
        path: of the site, for messages.
        value: the tensor that is cached, by which the entry is known.
        sources: the tensors that it was computed from.
        others: further values that are computed with it.
        frozen: the sources are weights that no optimizer trains. They are large, so only a sample of their rows is
            compared. A sample that did not change says nothing of the other rows, so after a write that PyTorch counted
            the value is computed again.
    """

    path: str
    value: torch.Tensor
    sources: Sequence[torch.Tensor]
    others: Sequence[torch.Tensor] = ()
    frozen: bool = False

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        return (self.value, *self.others)


class _Record(NamedTuple):
    """The tensors of an entry when it was up to date.

    The values are recorded too, since somebody may write into a buffer: a load, a cast, a user.

    Attributes:
        counter: of the optimizer's steps that may have changed the sources; None for frozen ones.
        steps: their number at that time.
        sources: snapshots of the sources.
        values: snapshots of the values.
    """

    counter: StepCount | None
    steps: int
    sources: Snapshot
    values: Snapshot

    @classmethod
    def of_each(cls, entries: Sequence[CacheEntry]) -> list[_Record]:
        # The first source is A.
        counters = [None if entry.frozen else step_count_of(entry.sources[0]) for entry in entries]
        steps = [0 if counter is None else counter.steps for counter in counters]
        groups = [entry.sources for entry in entries] + [entry.values for entry in entries]
        sampled = [entry.frozen for entry in entries] + [False] * len(entries)
        snapshots = Snapshot.of_each(groups, sampled=sampled)
        return list(map(cls, counters, steps, snapshots[: len(entries)], snapshots[len(entries) :]))

    def is_from_earlier_step(self) -> bool:
        return self.counter is not None and self.steps != self.counter.steps

    def is_untouched(self, entry: CacheEntry) -> bool:
        """Return whether PyTorch counted no write into the values, nor into sources whose bits are not all compared."""
        if not self.values.in_same_memory(entry.values):
            return False
        all_are_compared = isinstance(self.sources.bits, int) and not self.sources.sampled
        return all_are_compared or self.sources.in_same_memory(entry.sources)


class _PendingComparison(NamedTuple):
    """A comparison of sources on an accelerator with what is recorded, whose result the device has yet to write.

    Attributes:
        paths: of the sites, for messages.
        differ: bool `[len(paths)]` in host memory, written by the device.
        event: after the writing.
    """

    paths: tuple[str, ...]
    differ: torch.Tensor
    event: torch.Event


# By the entries' values. Weak, so that a model that is deleted frees its buffers.
_records = WeakTensorKeyDictionary()
_pending: list[_PendingComparison] = []


def record(entries: Sequence[CacheEntry]) -> None:
    """Record that entries are up to date."""
    for entry, known in zip(entries, _Record.of_each(entries), strict=True):
        _records[entry.value] = known


def is_from_earlier_step(value: torch.Tensor) -> bool:
    """Return whether an optimizer's step counts since `value` was recorded; the same on every rank that steps alike."""
    known = _records.get(value)
    return known is not None and known.is_from_earlier_step()


def are_up_to_date(entries: Sequence[CacheEntry]) -> list[bool]:
    """Return which values were recorded and follow from their sources as these are.

    On an accelerator True is given before the device has compared; see `raise_if_found_stale`.
    """
    answers = [False] * len(entries)
    on_device: dict[torch.device, list[tuple[CacheEntry, torch.Tensor]]] = {}
    for index, entry in enumerate(entries):
        known = _records.get(entry.value)
        if known is None or known.is_from_earlier_step():
            continue
        if known.is_untouched(entry):
            bits = known.sources.bits
            if isinstance(bits, int):
                answers[index] = known.sources.has_same_bits(entry.sources)
            elif known.sources.kinds == _kinds(entry.sources):
                on_device.setdefault(bits.device, []).append((entry, bits))
                answers[index] = True
        elif not entry.frozen and all(
            then.has_same_bits(now) for then, now in ((known.values, entry.values), (known.sources, entry.sources))
        ):
            # The tensors moved, or were written with the values that they had. To compute again would communicate, and
            # a rank that alone moved its parameters would hang there.
            record([entry])
            answers[index] = True
    for compared in on_device.values():
        _start_comparison(compared)
    return answers


def _start_comparison(compared: Sequence[tuple[CacheEntry, torch.Tensor]]) -> None:
    """Have the device compare the fingerprints of entries' sources with the recorded ones, without waiting for it."""
    # Everything that a captured CUDA graph does is done again at each replay, where nobody reads this answer.
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    entries, known = zip(*compared, strict=True)
    found = fingerprints([_compared(entry.sources, entry.frozen) for entry in entries])
    # A copy to pageable memory would wait for the device.
    differ = torch.empty(len(entries), dtype=torch.bool, pin_memory=True)
    differ.copy_(torch.stack(known) != found, non_blocking=True)
    event = torch.Event(found.device.type)
    event.record()
    _pending.append(_PendingComparison(tuple(entry.path for entry in entries), differ, event))


def raise_if_found_stale() -> None:
    """Read the results of comparisons that the device has finished; never waits.

    Raises:
        StaleParametersError: the bits of a site's parameters were not what its cached norm was computed from.
    """
    finished = [comparison for comparison in _pending if comparison.event.query()]
    for comparison in finished:
        _pending.remove(comparison)
    for comparison in finished:
        if comparison.differ.any():
            path = comparison.paths[int(comparison.differ.nonzero()[0])]
            raise StaleParametersError(
                f"{path}: its parameters were written past PyTorch's version counter and outside an "
                "optimizer's step (through .data, say), so earlier calls used the norms of the values before; call "
                "dora_fx.invalidate_norms(model) after such writes"
            )
