"""Calls of tools, reasoning and marks of turns: each is learned, honoured, or named; a template's silence is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dora_fx.app.data.encoding import SampleEncoder, TokenSample
from dora_fx.app.data.format_choice import format_of
from dora_fx.app.data.formats import Conversation
from dora_fx.app.data.records import Record
from tests.chat_templates import HEADERS, JOINED, ONE_CALL, REASONING, TOOLS, chat_tokenizer, unmarked
from tests.tables import every_case

LOOK_UP = {"type": "function", "function": {"name": "look", "description": "find it", "parameters": {"type": "object"}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASK, ANSWER = {"role": "user", "content": "where is it"}, {"role": "assistant", "content": "it is in the big garden"}
CALLS = {"role": "assistant", "tool_calls": [call("look", at="home")]}
RESULT = {"role": "tool", "content": "in the garden"}


def sample_of(messages: list[Any], **others: Any) -> Conversation:
    record = Record("file, line 1", {"messages": messages, **others})
    sample = format_of([record]).sample(record)
    assert isinstance(sample, Conversation)
    return sample


def encode(template: str, messages: list[Any], **others: Any) -> list[TokenSample]:
    return SampleEncoder(Path("base"), chat_tokenizer(template)).encode(sample_of(messages, **others))


def learned_texts(template: str, found: list[TokenSample]) -> list[str]:
    own = chat_tokenizer(template)
    runs = [run for each in found for is_target, run in each.runs() if is_target]
    return ["".join(own.convert_ids_to_tokens(run)) for run in runs]


@every_case("is_marked", [True, False], ids=["marked", "unmarked"])
@every_case("template", [TOOLS, ONE_CALL], ids=["as_qwen", "as_llama"])
def test_calls_are_learned_token_by_token_as_transformers_has_them(template: str, is_marked: bool) -> None:
    """Whatever of OpenAI's and ShareGPT's shapes a call has, arguments are written once as JSON."""
    messages = [ASK, CALLS, RESULT, ANSWER]
    expected = chat_tokenizer(template).apply_chat_template(
        messages, tools=[LOOK_UP], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    as_json = {"type": "function", "function": {"name": "look", "arguments": '{"at": "home"}'}}
    sharegpt = [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": json.dumps(CALLS["tool_calls"][0])},
        {"from": "observation", "value": RESULT["content"]},
        {"from": "gpt", "value": ANSWER["content"]},
    ]
    for turns, tools in (
        (messages, [LOOK_UP]),
        ([ASK, CALLS | {"content": ""}, RESULT | {"role": "function"}, ANSWER | {"tool_calls": []}], [LOOK_UP]),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": [as_json]}, RESULT, ANSWER], json.dumps([LOOK_UP])),
        (sharegpt, [LOOK_UP]),
    ):
        (found,) = encode(template if is_marked else unmarked(template), turns, tools=tools)
        assert found.ids == expected["input_ids"]
        assert found.is_target == [bool(mark) for mark in expected["assistant_masks"]]


def test_arguments_are_json_for_a_template_that_joins_them_to_a_text() -> None:
    for template in (JOINED, JOINED.replace("' ' + f.arguments + '(end)'", "' ' ~ f.arguments ~ '(end)'")):
        (found,) = encode(unmarked(template), [ASK, CALLS])
        (expected,) = encode(unmarked(TOOLS), [ASK, CALLS])
        assert found == expected


@every_case("is_marked", [True, False], ids=["marked", "unmarked"])
@every_case("mark", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0, "train": False}])
def test_a_turn_that_is_marked_is_given_and_not_learned(mark: dict[str, Any], is_marked: bool) -> None:
    def marked(template: str) -> str:
        return template if is_marked else unmarked(template)

    other = {"role": "assistant", "content": "no"}
    turns = [ASK, other | mark, ASK | {"loss": False}, ANSWER | {"weight": 1}]
    (found,) = encode(marked(HEADERS), turns)
    (unmarked_turns,) = encode(marked(HEADERS), [ASK, other, ASK, ANSWER])
    assert found.ids == unmarked_turns.ids
    assert learned_texts(HEADERS, [unmarked_turns]) == ["no<e>", "it is in the big garden<e>"]
    assert learned_texts(HEADERS, [found]) == ["it is in the big garden<e>"]
    assert learned_texts(HEADERS, encode(marked(HEADERS), [ASK, other, ASK, ANSWER | mark])) == ["no<e>"]
    # Where each answer is a sample of its own, a turn that is not learned has none.
    found_samples = encode(REASONING, turns)
    assert learned_texts(REASONING, found_samples) == ["(think)it is in the big garden<e>"]


@every_case(
    ("template", "turn", "others", "message"),
    [
        (HEADERS, CALLS | {"content": ""}, {}, r"message 2: .* leaves out tool_calls of this turn of the assistant"),
        (HEADERS, CALLS | {"content": "I look"}, {}, "leaves out tool_calls"),
        (HEADERS, ANSWER, {"tools": [LOOK_UP]}, "line 1: found tools, which the base's chat template leaves out"),
        (TOOLS.replace(" + f.arguments | tojson", ""), CALLS, {}, "leaves out the arguments of tool_calls"),
        (
            TOOLS.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]"),
            CALLS | {"tool_calls": [call("look"), call("go")]},
            {},
            "leaves out call 2 of tool_calls",
        ),
        (ONE_CALL, CALLS | {"content": "I look"}, {}, "leaves out content of this turn of the assistant, which would"),
        (HEADERS, ANSWER | {"reasoning_content": "hm"}, {}, "leaves out reasoning_content"),
        (HEADERS, {"role": "assistant", "content": "", "thinking": "hm"}, {}, "leaves out thinking"),
        (TOOLS, ANSWER | {"reasoning_content": "hm", "thinking": "oh"}, {}, "leaves out thinking"),
        (HEADERS, ANSWER | {"function_call": {"name": "look", "arguments": "{}"}}, {}, "leaves out function_call"),
        (
            unmarked(HEADERS).replace("m['content'] + '<e>'", "m['content'].split('(end)')[-1] + '<e>'"),
            {"role": "assistant", "content": "(think)hm(end)yes"},
            {},
            "leaves out a part of content",
        ),
    ],
)
def test_what_the_template_leaves_out_of_an_answer_is_an_error(
    template: str, turn: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    for chosen in (template, unmarked(template)):
        with pytest.raises(ValueError, match=rf"^file, line 1.*{message.removeprefix('line 1')}") as raised:
            encode(chosen, [ASK, turn], **others)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("is_long", [False, True])
def test_what_the_template_leaves_out_of_what_is_given_is_an_error(is_long: bool) -> None:
    more = " and this is not the whole of it" * is_long
    ignores_tools = TOOLS.replace("'(user)\n(result)' + m.content", "'(user)\n(result)'")
    with pytest.raises(ValueError, match=r"message 3: .* leaves out content of this turn of the tool, which the answ"):
        encode(ignores_tools, [ASK, CALLS, RESULT | {"content": "here" + more}, ANSWER])
    ignores_system = HEADERS.replace(
        "{{ m['content'] + '<e>' }}{% endif", "{% if m.role == 'user' %}{{ m['content'] }}{% endif %}{% endif"
    )
    with pytest.raises(ValueError, match=r"message 1: .* leaves out content of this turn of the system"):
        encode(ignores_system, [{"role": "system", "content": "be kind" + more}, ASK, ANSWER])
    # An answer that is said twice hides no turn that is left out.
    drops_first = HEADERS.replace(
        "{{ m['content'] + '<e>' }}{% endgen", "{{ (m['content'] if loop.index != 2 else '') + '<e>' }}{% endgen"
    )
    with pytest.raises(ValueError, match=r"message 2: .* leaves out content of this turn of the assistant"):
        encode(drops_first, [ASK, ANSWER, ASK, ANSWER])


def test_marks_that_are_not_part_of_what_is_learned_leave_a_call_out() -> None:
    """The template writes the call, outside of its marks of what the assistant says."""
    outside = TOOLS.replace("{% for call in", "{% endgeneration %}{% for call in").replace(
        "{{ '<e>' }}{% endgeneration %}", "{{ '<e>' }}"
    )
    with pytest.raises(ValueError, match="leaves out tool_calls"):
        encode(outside, [ASK, CALLS | {"content": "I look"}])
    encode(unmarked(outside), [ASK, CALLS | {"content": "I look"}])


def test_fields_that_are_only_context_are_named_once() -> None:
    turns = [ASK | {"id": 1}, CALLS | {"name": "bob", "id": 2}, RESULT | {"tool_call_id": "a", "name": "look"}, ANSWER]
    encoder = SampleEncoder(Path("base"), chat_tokenizer(TOOLS))
    for _ in range(2):
        encoder.encode(sample_of(turns, tools=[LOOK_UP]))
    assert list(encoder.unused_fields) == ["id", "name", "tool_call_id"]
    # Reasoning of a turn that is not learned is context as well; in a template that writes it, it is used.
    for template, expected in ((HEADERS, ["reasoning"]), (TOOLS.replace("reasoning_content", "reasoning"), [])):
        encoder = SampleEncoder(Path("base"), chat_tokenizer(template))
        encoder.encode(sample_of([ASK, ANSWER | {"reasoning": "hm", "train": False}, ASK, ANSWER]))
        assert list(encoder.unused_fields) == expected


@every_case(
    ("turn", "message"),
    [
        (ANSWER | {"train": False}, "found no turn of the assistant that is learned among 2"),
        (ANSWER | {"weight": 0.5}, r"turn 2: found 0\.5 as weight, expected true or false, 1 or 0"),
        (ANSWER | {"loss": "no"}, "turn 2: found 'no' as loss, expected true or false"),
        (ANSWER | {"train": [True]}, "turn 2: found a value of type list as train"),
        (ANSWER | {"train": True, "weight": 0}, "turn 2: found train and weight that differ"),
        (
            ANSWER | {"train_detail": [{"begin_offset": 0}]},
            "turn 2: found train_detail, a mark of what is learned that",
        ),
        (ANSWER | {"loss_scale": 2.0}, "turn 2: found loss_scale, a mark of what is learned that is not followed"),
        (ASK | {"train": True}, "turn 2: found train = True on a turn of the user, expected none or false"),
        (CALLS | {"tool_calls": "look"}, "turn 2, tool_calls: cannot be read"),
        (
            CALLS | {"tool_calls": ["look"]},
            "turn 2, tool_calls: found a value of type list, expected a list of objects",
        ),
        (
            CALLS | {"tool_calls": [{"function": {}}]},
            "turn 2, tool_calls, call 1: found the fields , expected the name",
        ),
        (
            CALLS | {"tool_calls": [{"name": "a", "arguments": "[1]"}]},
            r"call 1: found '\[1\]' as arguments, expected an",
        ),
        (CALLS | {"tool_calls": [{"name": "a", "arguments": "{x}"}]}, "call 1, arguments: cannot be read"),
        ({"role": "function_call", "content": "look it up"}, "turn 2, tool_calls: cannot be read"),
        ({"role": "assistant", "tool_calls": []}, "turn 2: found no content, expected a string"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_marks_and_calls_that_cannot_be_followed_are_named(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^file, line 1") as raised:
        sample_of([ASK, turn])
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value)


def test_a_turn_that_is_written_otherwise_later_cannot_be_left_unlearned_under_marks() -> None:
    last_thinks = HEADERS.replace("{% generation %}", "{% generation %}{% if loop.last %}{{ '(think)' }}{% endif %}")
    turns = [ASK, ANSWER | {"train": False}, ASK, ANSWER]
    with pytest.raises(ValueError, match="message 2: the chat template writes turns otherwise once others follow them"):
        encode(last_thinks, turns)
    assert learned_texts(HEADERS, encode(unmarked(last_thinks), turns)) == ["(think)it is in the big garden<e>"]
