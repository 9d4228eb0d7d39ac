"""Turns the data of a run into sequences of tokens, and checks its sizes against the base model and the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dora_fx.app.bases import DTYPES, check_batch_fits
from dora_fx.app.data import (
    BaseTokenizer,
    Conversation,
    Text,
    TokenSample,
    TrainingData,
    TrainingSequences,
    cut_text,
    held_out_indices,
    sequences_of_samples,
)
from dora_fx.app.errors import UserError
from dora_fx.app.options import FinetuneOptions

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class TrainingText:
    """The sequences of a run, the prompt of its generated samples, and notes for the user.

    `samples` are the samples that the sequences were made of; a plain text is cut into sequences and has none.
    """

    sequences: TrainingSequences
    prompt: Tensor
    samples: Sequence[TokenSample]
    notes: Sequence[str]


def training_text(
    options: FinetuneOptions, data: TrainingData, tokenizer: BaseTokenizer, config: Any, device: str
) -> TrainingText:
    """Tokenize the data into sequences, and check that a model of `config` can be trained on them with the options.

    Raises:
        UserError: the model lacks a token, the chat template refuses a sample, there is too little text, or a sequence,
            sample or batch is too large for the model, the text or the memory.
    """
    longest = config.max_position_embeddings
    if options.sequence_length > longest:
        raise UserError(
            f"--sequence-length: found {options.sequence_length}, expected at most {longest}, the base model's"
        )
    if config.num_hidden_layers % options.pp:
        raise UserError(
            f"--pp: found {options.pp}, expected a divisor of {config.num_hidden_layers}, the base model's layers"
        )
    check_batch_fits(
        options.batch_size, options.sequence_length, config, options.tp, device, DTYPES[options.dtype].itemsize
    )
    text = (_of_text if data.format.name == "text" else _of_samples)(options, data, tokenizer)
    if options.batch_size > len(text.sequences.train):
        raise UserError(
            f"--batch-size: found {options.batch_size}, expected at most {len(text.sequences.train)}, the sequences "
            "to train on; give more text, or --gradient-accumulation in place of a larger batch"
        )
    if options.sample_tokens and len(text.prompt) + options.sample_tokens > longest:
        raise UserError(
            f"--sample-tokens: found {options.sample_tokens} after {len(text.prompt)} of the prompt, expected at most "
            f"{longest} in all, the base model's"
        )
    return text


def with_steps(options: FinetuneOptions, num_sequences: int) -> FinetuneOptions:
    """Return options with `steps` instead of `epochs`: every training sequence is seen `epochs` times, rounded up."""
    if options.epochs is None:
        return options
    of_a_step = options.batch_size * options.gradient_accumulation
    return replace(options, epochs=None, steps=max(1, math.ceil(options.epochs * num_sequences / of_a_step)))


def _of_text(options: FinetuneOptions, data: TrainingData, tokenizer: BaseTokenizer) -> TrainingText:
    for flag, is_given in (("--no-packing", options.no_packing), ("--too-long", options.too_long != "drop")):
        if is_given:
            raise UserError(f"{flag}: found texts, which are cut into sequences; expected samples of another format")
    texts = [sample.text for sample in data.samples if isinstance(sample, Text)]
    tokens = tokenizer.documents(texts)
    try:
        sequences = cut_text(tokens, options.sequence_length, options.held_out_fraction, options.max_held_out)
    except ValueError as error:
        raise UserError(str(error)) from error
    held_out = sequences.held_out.tokens
    prompt = held_out[0, : min(_PROMPT_TOKENS, held_out.shape[1] // 2)]
    if options.prompt is not None:
        prompt = tokenizer.prompt(options.prompt)
    notes = [
        f"text: {sequences.num_tokens:,} tokens; {len(sequences.train)} training sequences and "
        f"{len(sequences.held_out)} held-out ones of {options.sequence_length}",
        *_unused(data),
    ]
    return TrainingText(sequences, prompt, [], notes)


def _of_samples(options: FinetuneOptions, data: TrainingData, tokenizer: BaseTokenizer) -> TrainingText:
    encoded, unused_of_turns = tokenizer.samples(data.samples)
    samples, notes = _of_length(encoded, options)
    try:
        sequences = sequences_of_samples(
            samples,
            options.sequence_length,
            options.held_out_fraction,
            options.max_held_out,
            packed=not options.no_packing,
        )
    except ValueError as error:
        raise UserError(f"{_named(options)}: {error}") from error
    learned = sum(sample.num_targets for sample in samples)
    rows = sequences.train
    padding = 1 - rows.num_tokens / (len(rows) * options.sequence_length)
    layout = "one in each" if options.no_packing else "packed"
    notes = [
        f"{data.format.name}: {len(samples):,} samples of {sequences.num_tokens:,} tokens, of which {learned:,} are "
        f"learned ({100 * learned / sequences.num_tokens:.0f} %); {len(rows)} training sequences and "
        f"{len(sequences.held_out)} held-out ones of {options.sequence_length}, {layout}, "
        f"{100 * padding:.0f} % padding",
        *notes,
        *_unused(data),
    ]
    if unused_of_turns:
        notes.append(f"fields of turns that the chat template leaves out: {', '.join(unused_of_turns)}")
    if len(encoded) > len(data.samples):
        notes.append(
            "the chat template writes earlier turns differently from the last: each answer is a sample of its own, "
            f"after the turns before it ({len(encoded):,} samples of {len(data.samples):,} conversations)"
        )
    return TrainingText(sequences, _prompt_of_samples(options, data, tokenizer, samples), samples, notes)


def _prompt_of_samples(
    options: FinetuneOptions, data: TrainingData, tokenizer: BaseTokenizer, samples: Sequence[TokenSample]
) -> Tensor:
    if options.prompt is None:
        # The first held-out sample, up to the first learned token.
        first = samples[int(held_out_indices(len(samples), options.held_out_fraction)[0])]
        return torch.tensor(first.ids[: first.is_target.index(True, 1)])
    if any(isinstance(sample, Conversation) for sample in data.samples) and tokenizer.has_chat_template:
        return tokenizer.chat_prompt(options.prompt)
    return tokenizer.prompt(options.prompt)


def _named(options: FinetuneOptions) -> str:
    """Return how the command line named the data, for messages."""
    return "--demo" if options.data is None else f"--data {options.data}"


def _of_length(samples: Sequence[TokenSample], options: FinetuneOptions) -> tuple[Sequence[TokenSample], list[str]]:
    """Drop, cut or refuse samples longer than a sequence, as `--too-long` says; return the rest and a note."""
    limit = options.sequence_length
    longer = [sample for sample in samples if len(sample.ids) > limit]
    if not longer:
        return samples, []
    longest = max(len(sample.ids) for sample in longer)
    counted = (
        f"{len(longer):,} of {len(samples):,} samples are longer than the {limit} tokens of a sequence, "
        f"the longest has {longest:,}"
    )
    if options.too_long == "error":
        raise UserError(
            f"--data {longer[0].where}: found {len(longer[0].ids):,} tokens; {counted}; "
            f"take --sequence-length {longest}, or --too-long drop or cut"
        )
    if options.too_long == "drop":
        kept = [sample for sample in samples if len(sample.ids) <= limit]
        done = f"left out; they fit with --sequence-length {longest}"
    else:
        cut = [replace(each, ids=each.ids[:limit], is_target=each.is_target[:limit]) for each in samples]
        kept = [sample for sample in cut if sample.num_targets]
        done = f"cut; {len(cut) - len(kept):,} of them have nothing left to learn and are left out"
    if len(kept) < 2:
        raise UserError(
            f"{_named(options)}: {counted}; expected at least two that are not; take --sequence-length {longest}"
        )
    return kept, [f"{counted}: they are {done}"]


def _unused(data: TrainingData) -> list[str]:
    return [f"fields of the data that are not used: {', '.join(data.unused)}"] if data.unused else []
