"""The text of a run as tokens, and its sizes checked against the base model's and the machine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dora_fx.cli.base_model import DTYPES
from dora_fx.cli.data import TokenBlocks, cut_blocks
from dora_fx.cli.errors import UserError
from dora_fx.cli.memory import check_batch_fits
from dora_fx.cli.options import FinetuneOptions
from dora_fx.cli.tokens import BaseTokenizer

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class TrainingText:
    """The sequences of a run, and the tokens that its samples start with."""

    blocks: TokenBlocks
    prompt: Tensor


def training_text(
    options: FinetuneOptions, documents: list[str], tokenizer: BaseTokenizer, config: Any, device: str
) -> TrainingText:
    """Tokenize and cut the documents, and check that a model of `config` can be trained on them with the options.

    Raises:
        UserError: a token that the model does not have, too little text, or a sequence, sample or batch that is longer
            or larger than the model, the text or the memory.
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
    tokens = tokenizer.documents(documents)
    blocks = cut_blocks(tokens, options.sequence_length, options.held_out_fraction, options.max_held_out)
    if options.batch_size > len(blocks.train):
        raise UserError(
            f"--batch-size: found {options.batch_size}, expected at most {len(blocks.train)}, the sequences to train "
            "on; give more text, or --gradient-accumulation in place of a larger batch"
        )
    prompt = _prompt(options, tokenizer, blocks.held_out)
    if options.sample_tokens and len(prompt) + options.sample_tokens > longest:
        raise UserError(
            f"--sample-tokens: found {options.sample_tokens} after {len(prompt)} of the prompt, expected at most "
            f"{longest} in all, the base model's"
        )
    return TrainingText(blocks, prompt)


def _prompt(options: FinetuneOptions, tokenizer: BaseTokenizer, held_out: Tensor) -> Tensor:
    if options.prompt is not None:
        return tokenizer.prompt(options.prompt)
    return held_out[0, : min(_PROMPT_TOKENS, held_out.shape[1] // 2)]
