"""What a conversation says and a chat template leaves out, found by writing it with and without.

A template that has no place for a field, calls of tools or reasoning for example, writes the turn without it and does
not fail. Of what the assistant says nothing may be left out, nor of the texts and tools that it answers to. Other
fields, such as ids, are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dora_fx.app.data.chat_template import WrittenConversation, changed_calls
from dora_fx.app.data.formats import Conversation
from dora_fx.app.data.turns import CALLS, REASONING

# Shorter texts may stand in what a template writes by itself.
_TELLING = 16


def check_nothing_left_out(written: WrittenConversation, unused: dict[str, None]) -> None:
    """Check what the template writes of every message.

    Args:
        written: the conversation.
        unused: names of fields of turns that are left out and may be; new ones are added.

    Raises:
        ValueError: the template leaves out what is learned, a text, a call, or the tools.
    """
    conversation = written.conversation
    for index in range(len(conversation.messages)):
        _check_message(written, index, unused)
    if conversation.tools and _is_same(lambda: written.without_tools().whole, written.whole):
        raise ValueError(
            f"{conversation.where}: found tools, which the base's chat template leaves out, expected a template that "
            "writes them; take a base that was trained to call tools, or remove them from the data"
        )


def _check_message(written: WrittenConversation, index: int, unused: dict[str, None]) -> None:
    conversation, message = written.conversation, written.conversation.messages[index]
    is_learned = conversation.is_learned(index)
    text = str(message.get("content") or "")
    shown = _shown(written, index)
    if text.strip() and not _is_surely_in(text, shown, conversation, index):
        if _makes_no_difference(written, index, message | {"content": ""}, shown):
            raise ValueError(_left_out(conversation, index, "content"))
        if is_learned and _squeezed(text) not in _squeezed(shown):
            raise ValueError(_left_out(conversation, index, "a part of content"))
    for name, changed in _without_each(message):
        if name in unused or not _makes_no_difference(written, index, changed, shown):
            continue
        if "tool_calls" in name or name in CALLS or (is_learned and name in REASONING):
            raise ValueError(_left_out(conversation, index, name))
        unused[name] = None


def _without_each(message: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a message without each of its fields beside role and content; the same reasoning under two names is one."""
    yield from changed_calls(message)
    for name, value in message.items():
        if name in REASONING:
            alike = [other for other in REASONING if message.get(other) == value]
            yield name, {key: kept for key, kept in message.items() if key not in alike}
        elif name not in ("role", "content", "tool_calls"):
            yield name, {"content": ""} | {key: kept for key, kept in message.items() if key != name}


def _shown(written: WrittenConversation, index: int) -> str:
    """What a model learns of a message; of one that is not learned, all that it may be given."""
    if not written.conversation.is_learned(index):
        return written.whole
    if written.is_marked:
        _, mask, spans = written.marked
        return "".join(written.whole[a:b] for mark, (a, b) in zip(mask, spans, strict=True) if mark)
    answer = written.answer(index)
    return answer.text[slice(*answer.span)]


def _makes_no_difference(written: WrittenConversation, index: int, message: dict[str, Any], shown: str) -> bool:
    other = written.with_message(index, message)
    return _is_same(lambda: _shown(other, index), shown)


def _is_same(write: Callable[[], str], shown: str) -> bool:
    try:
        return write() == shown
    except ValueError:
        # Without it the template fails, and so looks at it.
        return False


def _is_surely_in(text: str, shown: str, conversation: Conversation, index: int) -> bool:
    """Return whether a text stands in another once more than the other messages account for; False if unsure."""
    text = text.strip()
    if len(text) < _TELLING:
        return False
    others = [each for number, each in enumerate(conversation.messages) if number != index]
    return shown.count(text) == 1 and not any(text in str(other.get("content") or "") for other in others)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _left_out(conversation: Conversation, index: int, name: str) -> str:
    role = conversation.messages[index]["role"]
    why = "which would be learned" if conversation.is_learned(index) else "which the answers after it are given"
    return (
        f"{conversation.where}, message {index + 1}: the base's chat template leaves out {name} of this turn of the "
        f"{role}, {why}; take a base whose template writes it, write it as the content, or remove it"
    )
