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

from dora_fx.cache.fingerprint import digest, fingerprint, fingerprints, sampled_rows


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
        sampled: the bits are those of their `sampled_rows` alone.
    """

    memory: tuple[_Memory, ...]
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]
    bits: int | torch.Tensor
    sampled: bool

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], *, sampled: bool = False) -> Snapshot:
        """Take the snapshot; nothing waits for the device."""
        bits: int | torch.Tensor
        if all(tensor.is_cpu for tensor in tensors):
            bits = digest(tensors, sampled=sampled)
        else:
            bits = fingerprint(_looked_at(tensors, sampled))
        return cls(tuple(map(_Memory.of, tensors)), _kinds(tensors), bits, sampled)

    def in_same_memory(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these are the tensors that it was taken of, and PyTorch counted no write into them."""
        return len(tensors) == len(self.memory) and all(map(_Memory.is_still, self.memory, tensors))

    def has_same_bits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these tensors hold what those did, wherever; waits for the device."""
        if self.kinds != _kinds(tensors):
            return False
        if isinstance(self.bits, int):
            return self.bits == digest((tensor.cpu() for tensor in tensors), sampled=self.sampled)
        return bool(self.bits.to(tensors[0].device) == fingerprint(_looked_at(tensors, self.sampled)))


def _kinds(tensors: Sequence[torch.Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _looked_at(tensors: Sequence[torch.Tensor], sampled: bool) -> Sequence[torch.Tensor]:
    return [sampled_rows(tensor) for tensor in tensors] if sampled else tensors


class Claim(NamedTuple):
    """The claim that a value, and others that are kept with it, hold what follows from the sources as they are.

    Attributes:
        path: of the site, for messages.
        value, sources, others: tensors.
        frozen: the sources are weights that no optimizer trains. They are large, so only a sample of their rows is
            looked at, and equal bits do not make up for a write that PyTorch counted.
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
    """The tensors of a claim when it was true. The values are among them, as somebody may write into them.

    Attributes:
        steps: `num_optimizer_steps` then; None for frozen sources.
        sources, values: as they were.
    """

    steps: int | None
    sources: Snapshot
    values: Snapshot

    @classmethod
    def of(cls, claim: Claim) -> _Record:
        steps = None if claim.frozen else _optimizer_steps
        return cls(steps, Snapshot.of(claim.sources, sampled=claim.frozen), Snapshot.of(claim.values))

    def is_from_earlier_step(self) -> bool:
        return self.steps not in (None, _optimizer_steps)

    def is_untouched(self, claim: Claim) -> bool:
        """Return whether PyTorch counted no write since; of sources only where not all bits are compared anyway."""
        if not self.values.in_same_memory(claim.values):
            return False
        all_are_compared = isinstance(self.sources.bits, int) and not self.sources.sampled
        return all_are_compared or self.sources.in_same_memory(claim.sources)


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


def record_fresh(claim: Claim) -> None:
    """Note that a claim is true."""
    _records[claim.value] = _Record.of(claim)


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
        if record.is_untouched(claim):
            bits = record.sources.bits
            if isinstance(bits, int):
                answers[index] = record.sources.has_same_bits(claim.sources)
            elif record.sources.kinds == _kinds(claim.sources):
                asked.setdefault(bits.device, []).append((claim, bits))
                answers[index] = True
        elif not claim.frozen and all(
            then.has_same_bits(now) for then, now in ((record.values, claim.values), (record.sources, claim.sources))
        ):
            # Moved, or written with what was there already.
            record_fresh(claim)
            answers[index] = True
    for questions in asked.values():
        _ask(questions)
    return answers


def _ask(asked: Sequence[tuple[Claim, torch.Tensor]]) -> None:
    """Ask the device whether the fingerprints of claims' sources are those they are with."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    claims, known = zip(*asked, strict=True)
    found = fingerprints([_looked_at(claim.sources, claim.frozen) for claim in claims])
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
