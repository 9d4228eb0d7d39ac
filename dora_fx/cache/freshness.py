"""Tell whether a value that was computed from tensors is still theirs.

A source that moved, or was written in a way that PyTorch counts, shows at once; its bits then say whether it changed
at all. Writes through `.data`, NCCL and other ways past the counter show in the bits alone (`fingerprint.py`):

    on a CPU            compared at every look, before the value is used
    on an accelerator   compared without waiting for the device; the answer is read at a later look, and a change
                        that was missed raises StaleParametersError

An optimizer's step changes what it trains, through copies or flat buffers too, so it is not looked for: every value is
recorded with `num_optimizer_steps`, and the first look after a step calls it stale. That is so on all ranks alike,
which bits are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from dora_fx.cache.fingerprint import digest, fingerprint, fingerprints


class StaleParametersError(RuntimeError):
    """A cached norm or factor is not what the parameters give, and was used."""


_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def num_optimizer_steps() -> int:
    """Return the number of steps that all optimizers of this process took."""
    return _optimizer_steps


class _Memory(NamedTuple):
    """A tensor's memory and its version there, not to be mistaken for later memory at the same address."""

    storage: StorageWeakRef
    address: int
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Memory:
        # Tensors made in inference mode count no versions.
        version = -1 if tensor.is_inference() else tensor._version
        return cls(StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr(), version)

    def is_still(self, tensor: torch.Tensor) -> bool:
        return (
            tensor.data_ptr() == self.address
            and self.version == (-1 if tensor.is_inference() else tensor._version)
            and tensor.untyped_storage()._cdata == self.storage.cdata
        )


class Snapshot(NamedTuple):
    """Tensors as they were: their memory, shapes and bits.

    Attributes:
        bits: their `digest` on a CPU, their `fingerprint` on an accelerator.
    """

    memory: tuple[_Memory, ...]
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]
    bits: int | torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Snapshot:
        """Take the snapshot; nothing waits for the device."""
        bits = digest(tensors) if all(tensor.is_cpu for tensor in tensors) else fingerprint(tensors)
        return cls(tuple(map(_Memory.of, tensors)), _kinds(tensors), bits)

    def in_same_memory(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these are the tensors that it was taken of, and PyTorch counted no write into them."""
        return len(tensors) == len(self.memory) and all(map(_Memory.is_still, self.memory, tensors))

    def has_same_bits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these tensors hold what those did, wherever; waits for the device."""
        if self.kinds != _kinds(tensors):
            return False
        if isinstance(self.bits, int):
            return self.bits == digest(tensor.cpu() for tensor in tensors)
        return bool(self.bits.to(tensors[0].device) == fingerprint(tensors))


def _kinds(tensors: Sequence[torch.Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


class _Record(NamedTuple):
    """The tensors that a value was computed from. The value is in it too, as somebody may write into it.

    Attributes:
        steps: `num_optimizer_steps` then; None for sources that no optimizer trains.
        sources, values: as they were.
    """

    steps: int | None
    sources: Snapshot
    values: Snapshot

    def is_from_earlier_step(self) -> bool:
        return self.steps not in (None, _optimizer_steps)


class Claim(NamedTuple):
    """The claim that a value, and others that are kept with it, hold what follows from the sources as they are.

    Attributes:
        path: of the site, for messages.
        value, sources, others: as in `record_fresh`.
        sampled: the sources are views of parts of what the value follows from. Equal bits then do not make up for a
            write that PyTorch counted.
    """

    path: str
    value: torch.Tensor
    sources: Sequence[torch.Tensor]
    others: Sequence[torch.Tensor] = ()
    sampled: bool = False


class _Question(NamedTuple):
    """The question whether the bits of sources on an accelerator are as recorded; answered when the device gets there.

    Attributes:
        paths: of the sites, for messages.
        differ: bool `[len(paths)]` in host memory, written by the device.
        event: after the writing.
    """

    paths: tuple[str, ...]
    differ: torch.Tensor
    event: torch.Event


_records = WeakTensorKeyDictionary()
_questions: list[_Question] = []


def record_fresh(
    value: torch.Tensor,
    sources: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor] = (),
    *,
    sources_are_trained: bool = True,
) -> None:
    """Note that `value`, and `others` that are kept with it, hold what follows from the sources as they are."""
    steps = _optimizer_steps if sources_are_trained else None
    _records[value] = _Record(steps, Snapshot.of(sources), Snapshot.of((value, *others)))


def is_from_earlier_step(value: torch.Tensor) -> bool:
    """Return whether an optimizer stepped since `value` was recorded; the same on every rank that steps alike."""
    record = _records.get(value)
    return record is not None and record.is_from_earlier_step()


def are_fresh(claims: Sequence[Claim]) -> list[bool]:
    """Return which values were recorded with their sources and hold what follows from them.

    On an accelerator True may be an answer that a later look takes back; see `raise_if_answered_stale`.
    """
    answers = [False] * len(claims)
    asked: dict[torch.device, list[tuple[Claim, torch.Tensor]]] = {}
    for index, claim in enumerate(claims):
        record = _records.get(claim.value)
        if record is None or record.is_from_earlier_step():
            continue
        values = (claim.value, *claim.others)
        if record.values.in_same_memory(values) and record.sources.in_same_memory(claim.sources):
            bits = record.sources.bits
            if isinstance(bits, int):
                answers[index] = record.sources.has_same_bits(claim.sources)
            elif record.sources.kinds == _kinds(claim.sources):
                asked.setdefault(bits.device, []).append((claim, bits))
                answers[index] = True
        elif not claim.sampled and record.values.has_same_bits(values) and record.sources.has_same_bits(claim.sources):
            # Moved, or written with what was there already.
            _records[claim.value] = record._replace(sources=Snapshot.of(claim.sources), values=Snapshot.of(values))
            answers[index] = True
    for questions in asked.values():
        _ask(questions)
    return answers


def _ask(asked: Sequence[tuple[Claim, torch.Tensor]]) -> None:
    """Ask the device whether the fingerprints of claims' sources are those they are with."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    claims, known = zip(*asked, strict=True)
    found = fingerprints([claim.sources for claim in claims])
    differ = torch.empty(len(claims), dtype=torch.bool, pin_memory=True)
    differ.copy_(torch.stack(known) != found, non_blocking=True)
    event = torch.Event(found.device.type)
    event.record()
    _questions.append(_Question(tuple(claim.path for claim in claims), differ, event))


def raise_if_answered_stale() -> None:
    """Read the answers that came in since; never waits.

    Raises:
        StaleParametersError: the bits of a site's parameters were not what its cached norm was computed from.
    """
    answered = [question for question in _questions if question.event.query()]
    for question in answered:
        _questions.remove(question)
    for question in answered:
        if question.differ.any():
            path = question.paths[int(question.differ.nonzero()[0])]
            raise StaleParametersError(
                f"{path}: its parameters were written past PyTorch's version counter and outside an "
                "optimizer's step (through .data, say), so earlier calls used the norms of the values before; call "
                "dora_fx.invalidate_norms(model) after such writes"
            )
