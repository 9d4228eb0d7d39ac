"""Samples share sequences and know nothing of each other: every gradient is that of the samples alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import dora_fx
from dora_fx.app.data.encoding import TokenSample
from dora_fx.app.data.sequences import Sequences, held_out_indices, pack, sequences_of_samples
from dora_fx.models import build_gpt_model
from tests.closeness import assert_close, rounding, roundings_of
from tests.hf_models import tiny_hf_model
from tests.tables import every_case

LENGTHS = (17, 30, 9, 2, 25, 31, 12, 5)
CAPACITY = 32


def samples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[TokenSample]:
    """Random tokens, of which some are learned; the first among them in every other sample."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        found.append(TokenSample(f"line {number}", ids, [index % 3 != number % 2 for index in range(length)]))
    return found


def all_sequences(chosen: Sequence[TokenSample], *, packed: bool) -> Sequences:
    """What is trained on and what is held out, together."""
    parts = sequences_of_samples(chosen, CAPACITY, 0.01, 100, packed=packed)
    both = [(getattr(parts.train, name), getattr(parts.held_out, name)) for name in Sequences.__dataclass_fields__]
    return Sequences(*(None if first is None else torch.cat([first, second]) for first, second in both))


@pytest.fixture
def model(world: None) -> nn.Module:
    """A GPT with adapters whose factors and magnitudes are not those of the start."""
    hf = tiny_hf_model("llama_rope_llama3")
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    model = dora_fx.DoRA(targets, dim=4, alpha=8)(build_gpt_model(hf.config, hf.state_dict()))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module, parts: Sequence[Sequences]) -> dict[str, Tensor]:
    """Gradients of the summed loss of all that is learned, a forward pass for each part."""
    model.zero_grad()
    for part in parts:
        batch = part.batch()
        losses = model(batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels)
        losses[part.loss_mask()].sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_padded_and_single_samples_give_the_same_gradients(dtype: torch.dtype, model: nn.Module) -> None:
    """To the roundings of a forward and a backward pass, which sum in another order where there are other tokens."""
    model.to(dtype)
    bound = rounding(dtype, 3 * roundings_of(model))
    packed, padded = all_sequences(samples(), packed=True), all_sequences(samples(), packed=False)
    assert len(packed) < len(padded) == len(LENGTHS)
    alone = [Sequences(torch.tensor([each.ids]), torch.tensor([each.is_target])) for each in samples()]
    expected = gradients(model, alone)
    assert len(expected) == 24 and all(value.norm() > 0 for value in expected.values())
    assert_close(gradients(model, [packed]), expected, bound)
    assert_close(gradients(model, [padded]), expected, bound)


@pytest.mark.parametrize("part", ["sample", "positions", "mask"])
def test_the_comparison_notices_samples_that_are_not_kept_apart(part: str, model: nn.Module) -> None:
    """Without the mask of samples, the positions or the mask of losses, gradients are others."""
    sequences = all_sequences(samples(), packed=True)
    expected = gradients(model, [sequences])
    batch = sequences.batch()
    one_text = Sequences(sequences.tokens, sequences.is_target)
    faults = {
        "sample": (batch.position_ids, one_text.batch().attention_mask, sequences.loss_mask()),
        "positions": (batch.position_ids.flip(1), batch.attention_mask, sequences.loss_mask()),
        "mask": (batch.position_ids, batch.attention_mask, one_text.loss_mask()),
    }
    positions, attention_mask, loss_mask = faults[part]
    model.zero_grad()
    losses = model(batch.tokens, positions, attention_mask, labels=batch.labels)
    losses[loss_mask].sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert all((found[name] - value).norm() > 1e-3 * value.norm() for name, value in expected.items())


def test_a_token_changes_nothing_beyond_its_sample(model: nn.Module) -> None:
    sequences = all_sequences(samples(), packed=True)
    batch = sequences.batch()
    assert sequences.sample is not None
    row, column = 0, 3
    changed = batch.tokens.clone()
    changed[row, column] = (changed[row, column] + 1) % 64
    with torch.no_grad():
        before, after = (model(tokens, batch.position_ids, batch.attention_mask) for tokens in (batch.tokens, changed))
    differs = (before != after).any(dim=-1)
    own = sequences.sample[:, :-1] == sequences.sample[row, column]
    own[torch.arange(len(sequences)) != row] = False
    assert differs[row, column] and not differs[~own].any() and not differs[row, :column].any()


@pytest.mark.parametrize("packed", [True, False])
def test_every_sample_is_whole_in_one_sequence_and_its_learned_tokens_count_once(packed: bool) -> None:
    chosen = samples()
    sequences = all_sequences(chosen, packed=packed)
    batch = sequences.batch()
    assert int(sequences.loss_mask().sum()) == sum(each.num_targets for each in chosen)
    assert sequences.num_tokens == sum(LENGTHS)
    found = []
    for row in range(len(sequences)):
        starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], CAPACITY], strict=True):
            found.append(batch.tokens[row, start:stop].tolist())
    for each in chosen:
        assert any(ids[: len(each.ids)] == each.ids for ids in found)


def test_positions_start_from_zero_with_every_sample() -> None:
    """The ids themselves: what only shifts a sample moves no gradient beyond rounding."""
    sample = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 9, [0, 1, 2, 3, 3, 3, 4, 4, 4], [0] * 8 + [1]])
    whole = list(range(8))
    expected = [[0, 1, 2, 0, 1, 0, 1, 2], whole, [0, 0, 0, 0, 1, 2, 0, 1], whole]
    sequences = Sequences(torch.zeros_like(sample), sample=sample)
    assert sequences.batch().position_ids.tolist() == expected
    assert sequences[1:3].batch().position_ids.tolist() == expected[1:3]
    assert Sequences(sequences.tokens).batch().position_ids.tolist() == [whole] * 4


def test_positions_of_packed_and_padded_samples_are_counted_in_each() -> None:
    """Five samples of four tokens in sequences of nine, and one held out; padding counts from zero as a sample does."""
    chosen = samples([4] * 6)
    two, one, text = [0, 1, 2, 3, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))
    packed, padded = (sequences_of_samples(chosen, 9, 0.01, 100, packed=packed) for packed in (True, False))
    assert sorted(packed.train.batch().position_ids.tolist()) == [two, two, one]
    assert packed.held_out.batch().position_ids.tolist() == [one]
    assert padded.train.batch().position_ids.tolist() == [text] * 5
    assert padded.held_out.batch().position_ids.tolist() == [text]


def test_no_sample_is_trained_on_and_held_out() -> None:
    chosen = samples([10] * 20)
    parts = sequences_of_samples(chosen, CAPACITY, 0.25, 100, packed=True)
    train, held_out = (
        {tuple(row[i : i + 10]) for row in part.tokens.tolist() for i in (0, 10, 20)}
        for part in (parts.train, parts.held_out)
    )
    everything = {tuple(each.ids) for each in chosen}
    assert len(held_out & everything) == 5 and len(train & everything) == 15 and not train & held_out & everything
    assert len(sequences_of_samples(chosen, CAPACITY, 0.25, 1, packed=True).held_out) == 1


@every_case(("count", "fraction", "chosen"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.3, 3), (100, 0.05, 5)])
def test_held_out_samples_are_spread(count: int, fraction: float, chosen: int) -> None:
    found = held_out_indices(count, fraction).tolist()
    assert len(set(found)) == chosen and min(found) >= 0 and max(found) < count
    assert all(second - first >= count // chosen for first, second in pairwise(found))


def test_one_sample_is_too_few() -> None:
    with pytest.raises(ValueError, match="found one sample, expected at least two"):
        sequences_of_samples(samples([4]), CAPACITY, 0.1, 8, packed=True)


def test_other_samples_or_marks_have_another_fingerprint() -> None:
    first = samples()
    other_ids = [*first[:-1], samples(seed=1)[-1]]
    flipped = TokenSample(first[0].where, first[0].ids, [not mark for mark in first[0].is_target])
    prints = {
        sequences_of_samples(each, CAPACITY, 0.1, 8, packed=True).fingerprint
        for each in (first, other_ids, [flipped, *first[1:]])
    }
    assert len(prints) == 3


@every_case("seed", range(5))
def test_packing_wastes_little_and_loses_nothing(seed: int) -> None:
    lengths = torch.randint(1, 101, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    bins = pack(lengths, 100)
    assert sorted(index for members in bins for index in members) == list(range(400))
    assert all(sum(lengths[index] for index in members) <= 100 for members in bins)
    # The bound of first fit decreasing, which best fit decreasing shares, on the least number of bins there could be.
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 100) + 6 / 9
    assert pack(lengths, 100) == bins


def test_a_bin_may_be_filled_to_the_brim_and_nothing_is_packed_from_nothing() -> None:
    assert pack([10, 10, 5, 5], 10) == [[0], [1], [2, 3]]
    assert pack([], 10) == []


@pytest.mark.parametrize("packed", [True, False])
def test_a_sample_is_certain_when_each_of_its_learned_tokens_is(packed: bool) -> None:
    sequences = all_sequences(samples(), packed=packed)
    # Nothing is learned of a sample whose first token alone is marked.
    num_learned = sum(any(sample.is_target[1:]) for sample in samples())
    assert sequences.num_samples() == num_learned < len(LENGTHS)
    learned = sequences.loss_mask()
    just_likely, unlikely = -math.log(0.51), -math.log(0.49)
    losses = torch.where(learned, just_likely, unlikely)
    assert sequences.num_certain(losses) == num_learned
    # One token of a sample is enough, and the others of its sequence are as they were.
    row, column = learned.nonzero()[0].tolist()
    losses[row, column] = unlikely
    assert sequences.num_certain(losses) == num_learned - 1
    for loss in (unlikely, math.nan, math.inf):
        assert sequences.num_certain(torch.full_like(losses, loss)) == 0
    assert Sequences(sequences.tokens).num_samples() == 0
