"""Samples as tokens, with the tokens that are learned marked.

A token is learned where it overlaps what is learned of the text: the completion, or what the assistant says.
Templates that mark the latter with `{% generation %}` are followed, by transformers' own
`return_assistant_tokens_mask`. Of others it is what the template writes for a turn after the prompt for it, up to the
mark of its end: what a model has to generate when it answers. Where a template writes a turn otherwise once others
follow it, as those do that leave out earlier reasoning, every turn of the assistant becomes a sample of its own, with
the turns before it as they are then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dora_fx.app.data.chat_template import Span, WrittenConversation, write_conversation
from dora_fx.app.data.formats import Completion, Conversation, Sample, Text
from dora_fx.app.data.left_out import check_nothing_left_out
from dora_fx.files import reading

_CURE = "the tokenizer's files may be damaged, or be none of the library tokenizers; take a base with a tokenizer.json"


@dataclass(frozen=True)
class TokenSample:
    """Tokens of a sample and, for each, whether it is learned; `where` is its place, for messages."""

    where: str
    ids: list[int]
    is_target: list[bool]

    @property
    def num_targets(self) -> int:
        """Tokens that are learned; the first has nothing before it that it could be predicted from."""
        return sum(self.is_target[1:])

    def runs(self) -> list[tuple[bool, list[int]]]:
        """The tokens as runs of those that are learned and those that are not, in their order."""
        starts = [0] + [
            index for index in range(1, len(self.ids)) if self.is_target[index] != self.is_target[index - 1]
        ]
        return [(self.is_target[start], self.ids[start:stop]) for start, stop in pairwise([*starts, len(self.ids)])]


@dataclass(frozen=True)
class SampleEncoder:
    """transformers' tokenizer of a base, and the base's path for messages.

    `unused_fields` has the names of fields of turns that the chat template left out of what was encoded.
    """

    base: Path
    tokenizer: Any
    unused_fields: dict[str, None] = field(default_factory=dict)

    def encode(self, sample: Sample) -> list[TokenSample]:
        """Tokenize a sample; a conversation may become several, one for each answer.

        Raises:
            UnreadableFileError: the tokenizer fails, or does not tell which token is which part of a text.
            ValueError: it has no chat template, its template refuses the conversation, leaves out a part of it or
                does not show what is learned, or no token is learned.
        """
        found = self._encode(sample)
        for each in found:
            if not each.num_targets:
                raise ValueError(f"{each.where}: found no token that is learned among {len(each.ids)}, expected some")
        return found

    def chat_prompt(self, text: str) -> list[int]:
        """The tokens after which the assistant answers a user's text; raises ValueError as `encode` does."""
        conversation = Conversation("--prompt", [{"role": "user", "content": text}])
        prompt = WrittenConversation(self.tokenizer, conversation).text(1, is_prompt=True)
        return self._tokens("--prompt", prompt, []).ids

    def _encode(self, sample: Sample) -> list[TokenSample]:
        if isinstance(sample, Conversation) and self.tokenizer.chat_template is None:
            sample = _without_template(sample)
        if isinstance(sample, Conversation):
            written = write_conversation(self.tokenizer, sample)
            check_nothing_left_out(written, self.unused_fields)
            if not written.is_marked:
                return self._split_by_prompts(written)
            ids, is_target, _ = written.marked
            return [TokenSample(sample.where, ids, is_target)]
        if isinstance(sample, Text):
            return [self._document(sample.where, "", sample.text)]
        return [self._document(sample.where, sample.prompt, sample.completion)]

    def _split_by_prompts(self, written: WrittenConversation) -> list[TokenSample]:
        conversation = written.conversation
        learned = filter(conversation.is_learned, range(len(conversation.messages)))
        answers = [written.answer(index) for index in learned]
        if all(written.whole.startswith(answer.text) for answer in answers):
            return [self._tokens(conversation.where, written.whole, [answer.span for answer in answers])]
        return [self._tokens(conversation.where, answer.text, [answer.span]) for answer in answers]

    def _document(self, where: str, given: str, learned: str) -> TokenSample:
        """Two texts with the tokens that the tokenizer puts before and after, and the end of text, which is learned."""
        text, end = given + learned, self.tokenizer.eos_token_id
        found = self._tokens(where, text, [(len(given), len(text))], add_special_tokens=True)
        if end is None:
            return found
        if found.ids[-1:] == [end]:
            return TokenSample(where, found.ids, [*found.is_target[:-1], True])
        return TokenSample(where, [*found.ids, end], [*found.is_target, True])

    def _tokens(self, where: str, text: str, spans: Sequence[Span], *, add_special_tokens: bool = False) -> TokenSample:
        """The tokens of a text, learned where they overlap a span; chat templates write special tokens themselves."""
        with reading(self.base, _CURE):
            found = self.tokenizer(
                text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
            )
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        return TokenSample(where, ids, [any(a < stop and b > start for start, stop in spans) for a, b in offsets])


def _without_template(conversation: Conversation) -> Completion:
    if conversation.without_template is None:
        raise ValueError(
            f"{conversation.where}: found a conversation, but the base's tokenizer has no chat template; take a base "
            "that was trained on conversations, put its chat_template.jinja into the directory of the base, or write "
            "the data as prompt and completion, such as with --columns prompt=question completion=answer"
        )
    return conversation.without_template
