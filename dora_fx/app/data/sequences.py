"""Sequences of tokens for training: a text cut into them, or samples packed or padded; and the batches of a run."""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_fx.app.data.encoding import TokenSample
from dora_fx.models import causal_mask, separating_mask


@dataclass(frozen=True)
class Batch:
    """What a model takes for one forward pass.

    Attributes:
        tokens: inputs `[b, s]`.
        labels: the tokens that follow them, `[b, s]`.
        position_ids: `[b, s]`, from zero for every sample.
        attention_mask: `[1, 1, s, s]`, or `[b, 1, s, s]` where sequences have several samples; True where a position
            must not look.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Sequences:
    """Sequences `[n, s + 1]`: the inputs and, one token on, their labels.

    Attributes:
        tokens: token ids.
        is_target: whether a token is learned; None where all are.
        sample: number of the sample in its sequence that a token is of, and one more for padding, which comes last;
            None where a sequence is one text. Samples do not see each other.
        num_padding: tokens that are padding, `[n]`; None where there is none.
    """

    tokens: Tensor
    is_target: Tensor | None = None
    sample: Tensor | None = None
    num_padding: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> Sequences:
        parts = (self.tokens, self.is_target, self.sample, self.num_padding)
        return Sequences(*(None if part is None else part[rows] for part in parts))  # type: ignore[arg-type]

    @property
    def num_tokens(self) -> int:
        """Inputs that are no padding."""
        length = self.tokens.shape[1] - 1
        if self.num_padding is None:
            return len(self) * length
        # The last token is no input; it is padding wherever there is some.
        return len(self) * length - int((self.num_padding - 1).clamp(min=0).sum())

    def loss_mask(self) -> Tensor:
        """Which labels are learned, `[n, s]`."""
        labels = self.tokens[:, 1:]
        mask = torch.ones_like(labels, dtype=torch.bool) if self.is_target is None else self.is_target[:, 1:]
        return mask if self.sample is None else mask & (self.sample[:, 1:] == self.sample[:, :-1])

    def num_samples(self) -> int:
        """Samples that have something to learn; 0 where the sequences are texts."""
        return 0 if self.is_target is None else len(self._samples_of(self.loss_mask()))

    def num_certain(self, losses: Tensor) -> int:
        """Samples that greedy decoding is certain to answer word for word, by the losses `[n, s]` of their tokens.

        A token whose probability is above one half is the most probable one, and a sample of such tokens alone is what
        is decoded, given the turns before it. A loss that is not a number is no certainty.
        """
        learned = self.loss_mask()
        return self.num_samples() - len(self._samples_of(learned & ~(losses.cpu() < math.log(2))))

    def _samples_of(self, labels: Tensor) -> Tensor:
        """The samples that chosen labels `[n, s]` are of, each once: rows of the sequence's and the sample's number."""
        sample = torch.zeros_like(labels, dtype=torch.long) if self.sample is None else self.sample[:, 1:].long()
        row = torch.arange(len(self))[:, None].expand_as(sample)
        return torch.stack([row[labels], sample[labels]], dim=1).unique(dim=0)

    def batch(self, device: str | torch.device = "cpu") -> Batch:
        """All of the sequences as one batch on a device."""
        length = self.tokens.shape[1] - 1
        positions = torch.arange(length).expand(len(self), length)
        mask = causal_mask(length, device)
        if self.sample is not None:
            positions = _positions(self.sample[:, :-1])
            mask = separating_mask(self.sample[:, :-1].to(device))
        parts = (self.tokens[:, :-1], self.tokens[:, 1:], positions, mask)
        return Batch(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class TrainingSequences:
    """The sequences of a run; `num_tokens` is the length of all text or samples, `fingerprint` identifies it."""

    train: Sequences
    held_out: Sequences
    num_tokens: int
    fingerprint: str


def cut_text(tokens: Tensor, sequence_length: int, held_out_fraction: float, max_held_out: int) -> TrainingSequences:
    """Cut a row of tokens into sequences and hold some out, evenly spread over the text.

    Raises:
        ValueError: the text is too short for one sequence to train on and one to hold out.
    """
    num_blocks = (len(tokens) - 1) // sequence_length
    if num_blocks < 2:
        raise ValueError(
            f"the text has {len(tokens)} tokens, expected at least {2 * sequence_length + 1}: "
            f"two sequences of {sequence_length}; give more text or a smaller --sequence-length"
        )
    blocks = tokens[: num_blocks * sequence_length + 1].unfold(0, sequence_length + 1, sequence_length)
    # The last token of a block is the first of the next as a target and as an input: no pair is seen twice.
    is_held_out = torch.zeros(num_blocks, dtype=torch.bool)
    is_held_out[held_out_indices(num_blocks, held_out_fraction)] = True
    held_out = _spread(Sequences(blocks[is_held_out].contiguous()), max_held_out)
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return TrainingSequences(Sequences(blocks[~is_held_out].contiguous()), held_out, len(tokens), fingerprint)


def sequences_of_samples(
    samples: Sequence[TokenSample], sequence_length: int, held_out_fraction: float, max_held_out: int, *, packed: bool
) -> TrainingSequences:
    """Put samples into sequences whole, several in one if `packed`, with some samples held out, evenly spread.

    Args:
        samples: none longer than a sequence.
        sequence_length: tokens of one sequence.
        held_out_fraction: share of the samples.
        max_held_out: number of held-out sequences at most.
        packed: put samples side by side as they fit, else one into each sequence.

    Raises:
        ValueError: there is only one sample.
    """
    if len(samples) < 2:
        raise ValueError("found one sample, expected at least two: one to train on and one to hold out")
    held_out = set(held_out_indices(len(samples), held_out_fraction).tolist())
    parts = []
    for wanted in (False, True):
        chosen = [sample for index, sample in enumerate(samples) if (index in held_out) is wanted]
        lengths = [len(sample.ids) for sample in chosen]
        rows = pack(lengths, sequence_length) if packed else [[index] for index in range(len(chosen))]
        parts.append(_sequences([[chosen[index] for index in row] for row in rows], sequence_length, packed))
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(torch.tensor([len(sample.ids), *sample.ids, *sample.is_target]).numpy().tobytes())
    num_tokens = sum(len(sample.ids) for sample in samples)
    return TrainingSequences(parts[0], _spread(parts[1], max_held_out), num_tokens, digest.hexdigest())


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths fit the capacity together: the longest first, each into the fullest that fits."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of each bin and its number, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([])
            left, number = capacity, len(bins) - 1
        else:
            left, number = room.pop(place)
        bins[number].append(index)
        insort(room, (left - lengths[index], number))
    return bins


def held_out_indices(count: int, fraction: float) -> Tensor:
    """Which of `count` to hold out, evenly spread: a fraction of them, but one at least, and all but one at most."""
    chosen = min(max(round(count * fraction), 1), count - 1)
    return torch.arange(chosen) * count // chosen + count // (2 * chosen)


def training_batch(sequences: Sequences, batch_size: int, index: int, seed: int) -> Sequences:
    """Batch number `index` of an endless pass over the sequences, shuffled anew in every epoch.

    A function of its arguments alone, so a resumed run needs only its step to go on with the same sequences.
    """
    first = index * batch_size
    rows = []
    for position in range(first, first + batch_size):
        epoch, offset = divmod(position, len(sequences))
        rows.append(_epoch_order(len(sequences), seed, epoch)[offset])
    return sequences[torch.stack(rows)]


def _sequences(rows: Sequence[Sequence[TokenSample]], sequence_length: int, packed: bool) -> Sequences:
    width = sequence_length + 1
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    is_target = torch.zeros(len(rows), width, dtype=torch.bool)
    sample = torch.zeros(len(rows), width, dtype=torch.int32)
    num_padding = torch.zeros(len(rows), dtype=torch.long)
    for row, members in enumerate(rows):
        ids = [token for member in members for token in member.ids]
        tokens[row, : len(ids)] = torch.tensor(ids)
        is_target[row, : len(ids)] = torch.tensor([mark for member in members for mark in member.is_target])
        of = [number for number, member in enumerate(members) for _ in member.ids]
        sample[row] = torch.tensor(of + [len(members)] * (width - len(ids)), dtype=torch.int32)
        num_padding[row] = width - len(ids)
    if not packed:
        # Padding comes last, where no token of the sample sees it, and what it predicts is not learned.
        return Sequences(tokens, is_target, None, num_padding)
    return Sequences(tokens, is_target, sample, num_padding)


def _positions(sample: Tensor) -> Tensor:
    """Positions `[n, s]` that start from zero with every sample of a sequence."""
    length = sample.shape[1]
    index = torch.arange(length).expand_as(sample)
    starts = torch.ones_like(sample, dtype=torch.bool)
    starts[:, 1:] = sample[:, 1:] != sample[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _spread(sequences: Sequences, at_most: int) -> Sequences:
    """So many of the sequences at most, evenly spread."""
    count = len(sequences)
    return sequences if count <= at_most else sequences[torch.arange(at_most) * count // at_most]


@functools.lru_cache(maxsize=2)
def _epoch_order(num_blocks: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_blocks, generator=generator)
