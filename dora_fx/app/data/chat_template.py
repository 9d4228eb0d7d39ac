"""A conversation as a base's chat template writes it: its texts up to each turn, and the spans that are learned.

Arguments of calls are objects for most templates, which write them as JSON. Some join them to a text, and want the JSON
itself: such a template fails with an object, or writes it as Python does, and gets the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dora_fx.app.data.formats import Conversation
from dora_fx.files import reason_of
from dora_fx.models import apply_chat_template

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """A turn of the assistant: its message's index, the text up to its end, and the span of what it says in that."""

    index: int
    text: str
    span: Span


@dataclass(frozen=True)
class WrittenConversation:
    """A conversation under the chat template of a tokenizer; each text is written once."""

    tokenizer: Any
    conversation: Conversation
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict, repr=False)

    @cached_property
    def is_marked(self) -> bool:
        """Return whether the template marks what the assistant says."""
        return _GENERATION.search(self.tokenizer.get_chat_template(tools=self.conversation.tools)) is not None

    @property
    def whole(self) -> str:
        """The text of all messages; raises ValueError as `text`."""
        return self.text(len(self.conversation.messages))

    def text(self, num_messages: int, *, is_prompt: bool = False) -> str:
        """The text of the first messages, and of the prompt for an answer; raises ValueError if the template fails."""
        if (num_messages, is_prompt) not in self._texts:
            messages = self.conversation.messages[:num_messages]
            text = str(self._applied(messages, tokenize=False, add_generation_prompt=is_prompt))
            self._texts[num_messages, is_prompt] = text
        return self._texts[num_messages, is_prompt]

    def answer(self, index: int) -> Answer:
        """The answer that a message is, by the template's own prompt for it.

        Raises:
            ValueError: the template refuses the conversation, or writes something else than the prompt.
        """
        prompt, text = self.text(index, is_prompt=True), self.text(index + 1)
        if not text.startswith(prompt):
            raise ValueError(
                f"{self.conversation.where}, message {index + 1}: the chat template writes something else than its own "
                "prompt before the answer, so that what is learned cannot be told; put {% generation %} into it"
            )
        # What follows the mark of the end, a line break in most templates, no model has to generate.
        return Answer(index, text, (len(prompt), len(text.rstrip())))

    @cached_property
    def marked(self) -> tuple[list[int], list[bool], list[Span]]:
        """Tokens of the whole, whether each is learned by the template's marks, and their spans in the text.

        Raises:
            ValueError: the template refuses the conversation, or writes a turn that is not learned otherwise once
                others follow it.
        """
        with_mask = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        found = self._applied(self.conversation.messages, **with_mask)
        written = self.tokenizer(self.whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = [(start, stop) for start, stop in written["offset_mapping"]]
        mask = [bool(mark) for mark in found["assistant_masks"]]
        for index in self.conversation.given:
            start, stop = self._place(index)
            mask = [mark and not (start <= a and b <= stop) for mark, (a, b) in zip(mask, spans, strict=True)]
        return list(found["input_ids"]), mask, spans

    def with_message(self, index: int, message: dict[str, Any]) -> WrittenConversation:
        """The same with another message in place of one."""
        messages = self.conversation.messages
        changed = [*messages[:index], message, *messages[index + 1 :]]
        return WrittenConversation(self.tokenizer, replace(self.conversation, messages=changed))

    def without_tools(self) -> WrittenConversation:
        """The same without tools."""
        return WrittenConversation(self.tokenizer, replace(self.conversation, tools=None))

    def _place(self, index: int) -> Span:
        """The span of a message in the whole."""
        before, text = self.text(index), self.text(index + 1)
        if not (text.startswith(before) and self.whole.startswith(text)):
            raise ValueError(
                f"{self.conversation.where}, message {index + 1}: the chat template writes turns otherwise once others "
                "follow them, so that this one cannot be left unlearned; remove its mark, or the turns up to it"
            )
        return len(before), len(text)

    def _applied(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return apply_chat_template(self.tokenizer, messages, tools=self.conversation.tools, **options)
        except Exception as error:  # jinja2's, and whatever an expression of a template raises
            raise ValueError(
                f"{self.conversation.where}: the base's chat template refuses the conversation ({reason_of(error)})"
            ) from error


def write_conversation(tokenizer: Any, conversation: Conversation) -> WrittenConversation:
    """A conversation under a tokenizer's chat template, with the arguments of calls as the template takes them.

    Raises:
        ValueError: the template refuses the conversation.
    """
    written = WrittenConversation(tokenizer, conversation)
    objects = [value for value in map(_arguments, _calls(conversation)) if isinstance(value, dict) and value]
    if not objects:
        return written
    as_text = [_with_calls(message, _with_json_arguments) for message in conversation.messages]
    other = WrittenConversation(tokenizer, replace(conversation, messages=as_text))
    try:
        is_plain = not any(repr(value) in written.whole for value in objects)
    except ValueError:
        is_plain = not _is_taken(other)
    return written if is_plain else other


def changed_calls(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a message with one of its calls left out, and with none of its arguments, by what is changed."""
    calls = message.get("tool_calls") or []
    for index, call in enumerate(calls):
        name = "tool_calls" if len(calls) == 1 else f"call {index + 1} of tool_calls"
        others = [*calls[:index], *calls[index + 1 :]]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        # A template that needs a text would fail without one, and so seem to write the call.
        yield name, {"content": ""} | kept | ({"tool_calls": others} if others else {})
        if arguments := _arguments(call):
            empty: Any = "" if isinstance(arguments, str) else {}
            changed = [*calls[:index], _with_arguments(call, empty), *calls[index + 1 :]]
            yield f"the arguments of {name}", message | {"tool_calls": changed}


def _is_taken(written: WrittenConversation) -> bool:
    try:
        return bool(written.whole)
    except ValueError:
        return False


def _calls(conversation: Conversation) -> list[dict[str, Any]]:
    return [call for message in conversation.messages for call in message.get("tool_calls") or []]


def _arguments(call: dict[str, Any]) -> Any:
    inner = call.get("function")
    return (inner if isinstance(inner, dict) else call).get("arguments")


def _with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": inner | {"arguments": arguments}}
    return call | {"arguments": arguments}


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    return _with_arguments(call, json.dumps(_arguments(call) or {}, ensure_ascii=False))


def _with_calls(message: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message | {"tool_calls": [change(call) for call in calls]} if calls else message
