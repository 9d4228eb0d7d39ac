"""Formats of training data, told apart by the names of their fields, and what a record of each says.

text                a text, all of which is learned
messages            a conversation of role and content; what the assistant says is learned
sharegpt            the same under the names conversations, from and value
prompt-completion   two texts, of which the second is learned
alpaca              an instruction, perhaps an input, and an output, which is learned
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dora_fx.app.data.records import Record, check_text
from dora_fx.app.data.turns import read_tools, read_turn, turn_names
from dora_fx.files import shortened

_ALPACA_START = "Below is an instruction that describes a task"
_ALPACA_END = "Write a response that appropriately completes the request.\n\n"
_ALIKE = 0.75


@dataclass(frozen=True)
class Text:
    """A text, all of which is learned."""

    where: str
    text: str


@dataclass(frozen=True)
class Completion:
    """Two texts with nothing between them; the second is learned, and the end after it."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; what the assistant says is learned.

    Attributes:
        without_template: stands for it where the tokenizer has no chat template, None where nothing does.
        given: indices of messages of the assistant that are not learned.
    """

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    without_template: Completion | None = None
    given: frozenset[int] = frozenset()

    def is_learned(self, index: int) -> bool:
        """Return whether a message is the assistant's and is learned."""
        return self.messages[index]["role"] == "assistant" and index not in self.given


Sample = Text | Completion | Conversation


@dataclass(frozen=True)
class DataFormat:
    """A format: its name for `--data-format`, fields that every record has, others that are used, and its reader."""

    name: str
    fields: tuple[str, ...]
    sample: Callable[[Record], Sample]
    also_used: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def format_of(records: Sequence[Record], name: str | None = None) -> DataFormat:
    """The format of records: the one that is named, or the only one whose fields the first record has.

    Raises:
        ValueError: no format has the fields, or several, or a record has not those of the first; the message has the
            fields that were found and the nearest format.
    """
    first = records[0]
    fitting = [each for each in FORMATS.values() if _has(first, each)] if name is None else [FORMATS[name]]
    if not fitting:
        raise ValueError(
            f"{first.where}: found {_fields(first)}, expected those of a format; the nearest is {_nearest(first)}; "
            f"there are {', '.join(map(str, FORMATS.values()))}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{first.where}: found {_fields(first)}, which are those of {' and of '.join(map(str, fitting))}; "
            f"say which with --data-format {' or '.join(each.name for each in fitting)}"
        )
    for record in records:
        if not _has(record, fitting[0]):
            raise ValueError(_misfit(record, first, fitting[0], is_named=name is not None))
    return fitting[0]


def unused_fields(records: Sequence[Record], data_format: DataFormat) -> list[str]:
    """Names of fields that records have and the format does not use, in the order in which they come."""
    used = {*data_format.fields, *data_format.also_used}
    return list(dict.fromkeys(name for record in records for name in record.value if name not in used))


def _has(record: Record, data_format: DataFormat) -> bool:
    return all(record.value.get(name) is not None for name in data_format.fields)


def _misfit(record: Record, first: Record, expected: DataFormat, is_named: bool) -> str:
    found = f"{record.where}: found {_fields(record)}, expected those of {expected}"
    if is_named or record is first:
        return f"{found}, which --data-format names"
    others = [each for each in FORMATS.values() if _has(record, each)]
    mixed = f"; it is of the format {others[0].name}, and a file or folder has one format" if others else ""
    return f"{found}, which {first.where} has{mixed}"


def _fields(record: Record) -> str:
    names = [shortened(name) for name, value in record.value.items() if value is not None]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"the fields {shown}" if names else "no fields"


def _nearest(record: Record) -> DataFormat:
    """The format whose names are most like the record's, or one for values like the record's where no name is."""

    def likeness(data_format: DataFormat) -> float:
        return sum(map(best_ratio, data_format.fields)) / len(data_format.fields)

    def best_ratio(name: str) -> float:
        close = difflib.get_close_matches(name, record.value, 1, _ALIKE)
        return difflib.SequenceMatcher(None, name, close[0]).ratio() if close else 0.0

    found = max(FORMATS.values(), key=likeness)
    if likeness(found) > 0:
        return found
    if any(isinstance(value, list) for value in record.value.values()):
        return FORMATS["messages"]
    num_texts = sum(isinstance(value, str) for value in record.value.values())
    return FORMATS["prompt-completion" if num_texts > 1 else "text"]


def _text(record: Record, name: str, *, may_be_empty: bool = False) -> str:
    value = record.value.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{record.where}: found {shortened(value)} in the field {name}, expected a string")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{record.where}: found nothing in the field {name}, expected some text")
    return check_text(record.where, value)


def _text_sample(record: Record) -> Text:
    return Text(record.where, _text(record, "text", may_be_empty=True))


def _prompt_completion_sample(record: Record) -> Completion:
    return Completion(record.where, _text(record, "prompt", may_be_empty=True), _text(record, "completion"))


def _alpaca_sample(record: Record) -> Conversation:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    context = _text(record, "input", may_be_empty=True)
    with_context = bool(context.strip())
    request = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{context}\n\n" if with_context else "")
    paired = ", paired with an input that provides further context" if with_context else ""
    prompt = f"{_ALPACA_START}{paired}. {_ALPACA_END}{request}### Response:\n"
    messages = [
        {"role": "user", "content": f"{instruction}\n{context}" if with_context else instruction},
        {"role": "assistant", "content": output},
    ]
    return Conversation(
        record.where, _system(record) + messages, without_template=Completion(record.where, prompt, output)
    )


def _messages_sample(record: Record) -> Conversation:
    return _conversation(record, "messages")


def _sharegpt_sample(record: Record) -> Conversation:
    return _conversation(record, "conversations")


def _system(record: Record) -> list[dict[str, Any]]:
    system = _text(record, "system", may_be_empty=True)
    return [{"role": "system", "content": system}] if system else []


def _conversation(record: Record, name: str) -> Conversation:
    turns = record.value[name]
    names = turn_names(name, turns)
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else shortened(turns)
        raise ValueError(f"{record.where}: found {found} in {name}, expected a list of {' and '.join(names)}")
    tools = read_tools(record.where, record.value.get("tools"))
    read = [(message, False) for message in (_system(record) if name == "conversations" else [])]
    read += [read_turn(f"{record.where}, turn {number}", turn, *names) for number, turn in enumerate(turns, start=1)]
    messages = [message for message, _ in read]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{record.where}: found no turn of the assistant among {len(turns)}, expected one: nothing else is learned"
        )
    if not any(is_learned for _, is_learned in read):
        raise ValueError(
            f"{record.where}: found no turn of the assistant that is learned among {len(turns)}, expected one without "
            "a mark that says not to"
        )
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{record.where}: found a turn of the assistant first, expected one of the system or the user")
    given = {
        index for index, (message, is_learned) in enumerate(read) if message["role"] == "assistant" and not is_learned
    }
    return Conversation(record.where, messages, tools, given=frozenset(given))


FORMATS = {
    each.name: each
    for each in (
        DataFormat("text", ("text",), _text_sample),
        DataFormat("messages", ("messages",), _messages_sample, ("tools",)),
        DataFormat("sharegpt", ("conversations",), _sharegpt_sample, ("tools", "system")),
        DataFormat("prompt-completion", ("prompt", "completion"), _prompt_completion_sample),
        DataFormat("alpaca", ("instruction", "output"), _alpaca_sample, ("input", "system")),
    )
}
