"""Turns of a conversation as a chat template takes them, and whether the assistant's are learned.

What files hold beside a role and a text is kept for the template: calls of tools, reasoning, names. Three things are
brought into one shape, because templates write the other one as something else: a call that ShareGPT's files hold as
a text, arguments of a call that are JSON within JSON, and a text in parts. Marks of what is learned are read, and are
not for the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_fx.app.data.records import check_text
from dora_fx.files import parse_json, shortened

_FUNCTION_CALL = "function_call"
# Roles of chat templates, and those of ShareGPT's and OpenAI's files.
_SPEAKERS = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    _FUNCTION_CALL: "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What the assistant says beside its text; templates that know of reasoning know it by one of these names.
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", _FUNCTION_CALL)
# Whether a turn is learned, as axolotl, ms-swift and OpenAI write it.
_MARKS = ("train", "loss", "weight")
# Marks of other programs, which say of a part of a turn, or by how much, or which way round is not certain.
_OTHER_MARKS = ("train_detail", "loss_scale", "loss_weight", "loss_mask", "mask", "masked", "trainable", "learn")


def turn_names(name: str, turns: Any) -> tuple[str, str]:
    """Names of a turn's speaker and text: files have either pair under either name of the whole."""
    speakers = (
        {field for turn in turns if isinstance(turn, dict) for field in turn} if isinstance(turns, list) else set()
    )
    if "from" in speakers or (name == "conversations" and "role" not in speakers):
        return "from", "value"
    return "role", "content"


def read_turn(where: str, turn: Any, role: str, content: str) -> tuple[dict[str, Any], bool]:
    """A turn as a chat template takes it, and whether it is learned.

    Args:
        where: its place, for messages.
        turn: of a file.
        role, content: names of the speaker and the text in it, as `turn_names` returns them.

    Raises:
        ValueError: no such turn; a turn of the assistant that says nothing; a mark that cannot be followed.
    """
    if not isinstance(turn, dict) or turn.get(role) is None:
        found = f"the fields {', '.join(map(shortened, turn))}" if isinstance(turn, dict) else shortened(turn)
        raise ValueError(f"{where}: found {found}, expected an object with {role} and {content}")
    speaker, text = turn[role], _joined_parts(where, turn.get(content), content)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise ValueError(f"{where}: found {shortened(speaker)} as {role}, expected one of {', '.join(_SPEAKERS)}")
    # An empty list of calls, which some files give every turn, is none.
    others = {
        name: value
        for name, value in turn.items()
        if name not in (role, content, *_MARKS) and (value or value in (0, False))
    }
    says_more = any(name in others for name in (*CALLS, *REASONING))
    if not isinstance(text, str) and not (text is None and says_more):
        found = f"no {content}" if text is None else f"{shortened(text)} as {content}"
        raise ValueError(f"{where}: found {found}, expected a string")
    spoken_by = _SPEAKERS[speaker]
    is_learned = _is_learned(where, turn, spoken_by)
    if is_learned and not says_more and not (text or "").strip():
        raise ValueError(f"{where}: found an empty turn of the assistant, expected some text: it would be learned")
    if text is not None:
        check_text(where, text)
    if speaker == _FUNCTION_CALL and text is not None:
        text, others = None, {"tool_calls": text} | others
    if "tool_calls" in others:
        others["tool_calls"] = _calls(f"{where}, tool_calls", others["tool_calls"])
    said = {} if text is None else {"content": text}
    return {"role": spoken_by, **said, **others}, is_learned


def is_marked_learned(turn: Mapping[str, Any]) -> bool:
    """Tell whether a turn has a mark that it is learned."""
    return any(turn.get(name) for name in _MARKS)


def read_tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a record, None where there are none; raises ValueError unless they are objects, or JSON of them."""
    read = parse_json(tools, f"{where}, tools") if isinstance(tools, str) and tools.lstrip().startswith("[") else tools
    if read and not (isinstance(read, list) and all(isinstance(tool, dict) for tool in read)):
        raise ValueError(f"{where}: found {shortened(read)} in tools, expected a list of objects")
    return read or None


def _joined_parts(where: str, text: Any, content: str) -> Any:
    """The text that OpenAI's parts of a content are together, with nothing between; anything else as it is."""
    if not isinstance(text, list):
        return text
    if not text:
        raise ValueError(f"{where}: found an empty list as {content}, expected a string or parts with a text")
    return "".join(_text_of_part(f"{where}, part {number}", part) for number, part in enumerate(text, start=1))


def _text_of_part(where: str, part: Any) -> str:
    expected = '{"type": "text", "text": ...}'
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        found = f"the fields {', '.join(map(shortened, part))}" if isinstance(part, dict) else shortened(part)
        raise ValueError(f"{where}: found {found}, expected {expected}")
    if part["type"] != "text":
        raise ValueError(
            f"{where}: found {shortened(part['type'])} as type, expected text: text alone is trained on, "
            "and no images, audio or files"
        )
    others = [name for name, value in part.items() if name not in ("type", "text") and value is not None]
    if others or not isinstance(part.get("text"), str):
        found = f"{shortened(others[0])} in the part" if others else f"{shortened(part.get('text'))} as text"
        raise ValueError(f"{where}: found {found}, expected {expected}")
    return str(part["text"])


def _is_learned(where: str, turn: Mapping[str, Any], speaker: str) -> bool:
    for name in _OTHER_MARKS:
        if turn.get(name) is not None:
            raise ValueError(
                f"{where}: found {name}, a mark of what is learned that is not followed, expected one of "
                f"{', '.join(_MARKS)}: true or false for the whole turn"
            )
    marks = {name: turn[name] for name in _MARKS if turn.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"{where}: found {shortened(value)} as {name}, expected true or false, 1 or 0: a turn is learned or not"
            )
        if value and speaker != "assistant":
            raise ValueError(
                f"{where}: found {name} = {shortened(value)} on a turn of the {speaker}, expected none or false: what "
                "the assistant says is learned"
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise ValueError(f"{where}: found {' and '.join(marks)} that differ, expected them to agree: is it learned?")
    return speaker == "assistant" and all(marks.values())


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls as objects with objects of arguments; each may be JSON of it."""
    read = parse_json(calls, where) if isinstance(calls, str) else calls
    read = [read] if isinstance(read, dict) else read
    if not isinstance(read, list) or not all(isinstance(call, dict) for call in read) or not read:
        raise ValueError(f"{where}: found {shortened(calls)}, expected a list of objects, or JSON of one")
    return [_call(f"{where}, call {number}", call) for number, call in enumerate(read, start=1)]


def _call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": _call(where, inner)}
    if not isinstance(call.get("name"), str):
        raise ValueError(f"{where}: found the fields {', '.join(map(shortened, call))}, expected the name of a tool")
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    read = parse_json(arguments, f"{where}, arguments") if arguments.strip() else {}
    if not isinstance(read, dict):
        raise ValueError(f"{where}: found {shortened(arguments)} as arguments, expected an object, or JSON of one")
    return call | {"arguments": read}
