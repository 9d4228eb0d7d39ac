"""Text as token ids: with the tokenizer's own start and end tokens, and within the model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_fx.app.data.encoding import SampleEncoder, TokenSample
from dora_fx.app.data.formats import Sample
from dora_fx.app.errors import UserError
from dora_fx.files import UnreadableFileError, reading

_CURE = "the tokenizer's files may be damaged; download them again, or upgrade transformers and tokenizers"


def is_utf8(text: str) -> bool:
    """Tell whether a text can be written in UTF-8: other bytes of a command line reach Python as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class BaseTokenizer:
    """A base's tokenizer, checked against the model that its tokens are for.

    Args:
        path: of the base, for messages.
        tokenizer: transformers'.
        vocab_size: rows of the model's embedding.
    """

    def __init__(self, path: Path, tokenizer: Any, vocab_size: int) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @property
    def end(self) -> int | None:
        """The token that ends a text, None where the tokenizer has none."""
        return self._tokenizer.eos_token_id

    def documents(self, texts: list[str]) -> Tensor:
        """All texts as one row of tokens.

        Each is what `tokenizer(text)` gives, with the tokens that it puts before and after a text, and ends with the
        end-of-text token where the tokenizer has one.

        Raises:
            UserError: the tokenizer fails, or gives a token that the model does not have.
        """
        ids: list[int] = []
        for text in texts:
            ids += self._encode(text)
            if self.end is not None and ids[-1:] != [self.end]:
                ids.append(self.end)
        return self._checked(ids, "the text")

    @property
    def has_chat_template(self) -> bool:
        """Tell whether it writes conversations."""
        return self._tokenizer.chat_template is not None

    def samples(self, samples: Sequence[Sample]) -> tuple[list[TokenSample], list[str]]:
        """Every sample as tokens, some of which are learned, and names of fields of turns that nothing uses.

        A conversation may become several.

        Raises:
            UserError: the tokenizer or its chat template does not take a sample, as `SampleEncoder.encode` says, or
                gives a token that the model does not have.
        """
        encoder = SampleEncoder(self._path, self._tokenizer)
        try:
            found = [tokens for sample in samples for tokens in encoder.encode(sample)]
        except UnreadableFileError as error:
            raise UserError(f"--base {error}") from error
        except ValueError as error:
            raise UserError(f"--data {error}") from error
        self._checked([index for sample in found for index in sample.ids], "the text")
        return found, list(encoder.unused_fields)

    def chat_prompt(self, text: str) -> Tensor:
        """The tokens after which the assistant answers a text of the user; raises UserError as `prompt`."""
        if not is_utf8(text):
            raise UserError("--prompt: found bytes that are not UTF-8, expected text")
        try:
            return self._checked(SampleEncoder(self._path, self._tokenizer).chat_prompt(text), "--prompt")
        except ValueError as error:
            raise UserError(str(error)) from error

    def runs(self, sample: TokenSample) -> list[tuple[bool, int, str]]:
        """A sample as runs of tokens: whether they are learned, how many they are, and their text."""
        return [(learned, len(ids), self._tokenizer.decode(ids)) for learned, ids in sample.runs()]

    def prompt(self, text: str) -> Tensor:
        """The tokens of the start of a text: as `documents`, but without an end.

        Raises:
            UserError: there is no token in it, the tokenizer fails, or it gives a token that the model does not have.
        """
        if not is_utf8(text):
            raise UserError("--prompt: found bytes that are not UTF-8, expected text")
        ids = self._encode(text)
        while ids and ids[-1] == self.end:
            ids.pop()
        if not ids:
            raise UserError("--prompt: found no token in it, expected some text")
        return self._checked(ids, "--prompt")

    def text(self, ids: Tensor) -> str:
        """Tokens as text."""
        return self._tokenizer.decode(ids.tolist())

    def beyond_the_model(self) -> int:
        """Count the tokens of the tokenizer that the model does not have; a text need not use them."""
        return sum(index >= self._vocab_size for index in self._tokenizer.get_vocab().values())

    def _encode(self, text: str) -> list[int]:
        try:
            with reading(self._path, _CURE):
                return list(self._tokenizer(text, verbose=False)["input_ids"])
        except ValueError as error:
            raise UserError(f"--base {error}") from error

    def _checked(self, ids: list[int], what: str) -> Tensor:
        for index in set(ids):
            if not isinstance(index, int) or not 0 <= index < self._vocab_size:
                token = None if index is None else self._tokenizer.convert_ids_to_tokens(index)
                raise UserError(
                    f"--base {self._path}: {what} has the token {token!r} with id {index}, expected an id below "
                    f"{self._vocab_size}, the model's vocabulary; the tokenizer is another model's, or has tokens that "
                    "the model was not resized for"
                )
        return torch.tensor(ids, dtype=torch.long)
