"""Formats of training data, by the names of their fields, and what a record of each says.

text                  a text, all of which is learned
messages              a conversation of role and content; what the assistant says is learned
sharegpt              the same under the names conversations, from and value
prompt-completion     two texts, of which the second is learned; or two lists of messages, as TRL has them
alpaca                an instruction, perhaps an input, and an output, which is learned
instruction-response  the same under other names
question-answer       a question of the user and an answer of the assistant, which is learned
input-output          the same under other names
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dora_fx.app.data.records import Record, check_text
from dora_fx.app.data.turns import is_marked_learned, read_tools, read_turn, turn_names
from dora_fx.files import shortened

_ALPACA_START = "Below is an instruction that describes a task"
_ALPACA_END = "Write a response that appropriately completes the request.\n\n"


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
    """A format.

    Attributes:
        name: for `--data-format`.
        fields: those that every record has.
        sample: its reader.
        also_used: other fields that are used.
        used_beside_messages: others that are used where the first field is a list of messages.
        gives_way: whether a record that also has the fields of another format is of that one: files of conversations
            often have a question and its answer by themselves, too.
    """

    name: str
    fields: tuple[str, ...]
    sample: Callable[[Record], Sample]
    also_used: tuple[str, ...] = field(default=())
    used_beside_messages: tuple[str, ...] = field(default=())
    gives_way: bool = False

    @property
    def names(self) -> frozenset[str]:
        """All fields that are used."""
        return frozenset((*self.fields, *self.also_used, *self.used_beside_messages))

    def used_in(self, record: Record) -> frozenset[str]:
        """The fields of a record that are used."""
        has_messages = isinstance(record.value.get(self.fields[0]), list)
        return self.names if has_messages else self.names - frozenset(self.used_beside_messages)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def _text(record: Record, name: str, *, may_be_empty: bool = False) -> str:
    value = record.value.get(name, "")
    if not isinstance(value, str):
        raise ValueError(
            f"{record.where}: found {shortened(value)} in the field {record.column(name)}, expected a string"
        )
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{record.where}: found nothing in the field {record.column(name)}, expected some text")
    return check_text(record.where, value)


def _text_sample(record: Record) -> Text:
    return Text(record.where, _text(record, "text", may_be_empty=True))


def _prompt_completion_sample(record: Record) -> Completion | Conversation:
    if not any(isinstance(record.value[name], list) for name in ("prompt", "completion")):
        return Completion(record.where, _text(record, "prompt", may_be_empty=True), _text(record, "completion"))
    given, said = _turns(record, "prompt"), _turns(record, "completion")
    for number, turn in enumerate(record.value["prompt"], start=1):
        if is_marked_learned(turn):
            raise ValueError(
                f"{record.where}, {record.column('prompt')}, turn {number}: found a mark that the turn is learned, "
                "expected none: what the assistant says in the completion is learned"
            )
    # As the sample is read, what the assistant said before is given.
    return _conversation(record, [(message, False) for message, _ in given] + said)


def _alpaca_sample(record: Record) -> Conversation:
    return _instruction(record, "output", _text(record, "input", may_be_empty=True))


def _instruction_response_sample(record: Record) -> Conversation:
    contexts = [_text(record, name, may_be_empty=True) for name in ("input", "context")]
    if all(map(str.strip, contexts)):
        raise ValueError(
            f"{record.where}: found texts in {record.column('input')} and in {record.column('context')}, "
            "expected one of them"
        )
    return _instruction(record, "response", max(contexts, key=lambda text: bool(text.strip())))


def _pair_sample(record: Record, ask: str, say: str) -> Conversation:
    question, answer = _text(record, ask), _text(record, say)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(record.where, _system(record) + messages)


def _instruction(record: Record, say: str, context: str) -> Conversation:
    instruction, output = _text(record, "instruction"), _text(record, say)
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
    return _conversation(record, _turns(record, "messages"))


def _sharegpt_sample(record: Record) -> Conversation:
    turns = _turns(record, "conversations")
    return _conversation(record, [(message, False) for message in _system(record)] + turns)


def _system(record: Record) -> list[dict[str, Any]]:
    system = _text(record, "system", may_be_empty=True)
    return [{"role": "system", "content": system}] if system else []


def _turns(record: Record, name: str) -> list[tuple[dict[str, Any], bool]]:
    """The turns of a field as messages for a chat template, and whether each is learned."""
    turns = record.value[name]
    names = turn_names(name, turns)
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else shortened(turns)
        raise ValueError(
            f"{record.where}: found {found} in {record.column(name)}, expected a list of {' and '.join(names)}"
        )
    # A record has one list of turns, or a prompt and a completion.
    place = record.where if name in ("messages", "conversations") else f"{record.where}, {record.column(name)}"
    return [read_turn(f"{place}, turn {number}", turn, *names) for number, turn in enumerate(turns, start=1)]


def _conversation(record: Record, turns: Sequence[tuple[dict[str, Any], bool]]) -> Conversation:
    """A conversation of messages, each with whether it is learned."""
    messages = [message for message, _ in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{record.where}: found no turn of the assistant among {len(turns)}, expected one: nothing else is learned"
        )
    if not any(is_learned for _, is_learned in turns):
        raise ValueError(
            f"{record.where}: found no turn of the assistant that is learned among {len(turns)}, expected one without "
            "a mark that says not to, and in the completion where there is one"
        )
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{record.where}: found a turn of the assistant first, expected one of the system or the user")
    given = {
        index for index, (message, is_learned) in enumerate(turns) if message["role"] == "assistant" and not is_learned
    }
    tools = read_tools(record.where, record.value.get("tools"))
    return Conversation(record.where, messages, tools, given=frozenset(given))


FORMATS = {
    each.name: each
    for each in (
        DataFormat("text", ("text",), _text_sample),
        DataFormat("messages", ("messages",), _messages_sample, ("tools",)),
        DataFormat("sharegpt", ("conversations",), _sharegpt_sample, ("tools", "system")),
        DataFormat(
            "prompt-completion",
            ("prompt", "completion"),
            _prompt_completion_sample,
            used_beside_messages=("tools",),
        ),
        DataFormat("alpaca", ("instruction", "output"), _alpaca_sample, ("input", "system")),
        DataFormat(
            "instruction-response",
            ("instruction", "response"),
            _instruction_response_sample,
            ("input", "context", "system"),
            gives_way=True,
        ),
        DataFormat(
            "question-answer",
            ("question", "answer"),
            partial(_pair_sample, ask="question", say="answer"),
            ("system",),
            gives_way=True,
        ),
        DataFormat(
            "input-output",
            ("input", "output"),
            partial(_pair_sample, ask="input", say="output"),
            ("system",),
            gives_way=True,
        ),
    )
}
