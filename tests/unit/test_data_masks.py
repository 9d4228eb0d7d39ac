"""Which tokens of a sample are learned, against transformers' own mask and against a count that is made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dora_fx.app.data.encoding import SampleEncoder, TokenSample
from dora_fx.app.data.format_choice import format_of, unused_fields
from dora_fx.app.data.formats import Completion, Conversation
from dora_fx.app.data.records import Record
from tests.chat_templates import BRACKETS, HEADERS, REASONING, chat_tokenizer, unmarked
from tests.hf_models import tiny_tokenizer
from tests.sample_files import SAMPLES
from tests.tables import every_case


def conversation(*turns: str) -> Conversation:
    """Turns of the user and the assistant, in turn; the first begins with `sys` where it is the system's."""
    roles = ["system", "user", "assistant"] if turns[0].startswith("sys") else ["user", "assistant"]
    first = len(roles) - 2
    names = [roles[0] if index < first else roles[first + (index - first) % 2] for index in range(len(turns))]
    return Conversation(
        "file, line 1", [{"role": name, "content": turn} for name, turn in zip(names, turns, strict=True)]
    )


CONVERSATIONS = {
    "one_turn": conversation("hello", "hi"),
    "spaces": conversation("a b", "c", "d", " e  f "),
    "the_same_text_in_every_turn": conversation("hello", "hello", "hello", "hello"),
    "marks_of_the_template_in_texts": conversation("hello", "(assistant)", "x", "(user)\n<e>"),
    "line_breaks_at_the_ends": conversation("hello", "a\n", "x", "\nb"),
    "characters_without_a_token": conversation("hello", "caf\u00e9 \U0001f600 \u4e2d", "x", "y"),
    "ends_with_the_user": conversation("hello", "hi", "no answer"),
}


def encode(tokenizer: Any, sample: Any) -> list[TokenSample]:
    return SampleEncoder(Path("base"), tokenizer).encode(sample)


@every_case("template", [HEADERS, BRACKETS], ids=["headers", "brackets"])
@every_case("sample", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_masks_are_transformers_token_by_token(sample: Conversation, template: str) -> None:
    """A template that marks what the assistant says gives transformers' mask; the same one without marks, ours."""
    tokenizer = chat_tokenizer(template)
    expected = tokenizer.apply_chat_template(
        sample.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    for chosen in (template, unmarked(template)):
        (found,) = encode(chat_tokenizer(chosen), sample)
        assert found.ids == expected["input_ids"]
        assert found.is_target == [bool(mark) for mark in expected["assistant_masks"]]


@every_case("sample", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_as_many_tokens_are_learned_as_the_assistant_says_and_one_more_for_each_end(sample: Conversation) -> None:
    (found,) = encode(chat_tokenizer(unmarked(HEADERS)), sample)
    said = [message["content"] for message in sample.messages if message["role"] == "assistant"]
    own = tiny_tokenizer()
    assert found.num_targets == sum(len(own(text).input_ids) + 1 for text in said)


def test_a_system_s_text_is_not_learned() -> None:
    (found,) = encode(chat_tokenizer(unmarked(HEADERS)), conversation("sys be kind", "hello", "hi"))
    own = tiny_tokenizer()
    assert [(learned, own.convert_ids_to_tokens(ids)) for learned, ids in found.runs()] == [
        (False, [*"(system)\nsys be kind", "<e>", *"\n(user)\nhello", "<e>", *"\n(assistant)\n"]),
        (True, ["h", "i", "<e>"]),
        (False, ["\n"]),
    ]


def test_a_token_that_reaches_over_the_start_of_an_answer_is_learned() -> None:
    """As transformers does: a merged token is of both sides, and the answer would lack it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"?": 0, "a": 1, "b": 2, " ": 3, " b": 4, "<e>": 5}
    backend = Tokenizer(models.BPE(vocabulary, [(" ", "b")], unk_token="?"))
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="?")
    (found,) = encode(own, Completion("file, line 1", "a ", "ba"))
    assert found.ids == [1, 4, 1, 5] and found.is_target == [False, True, True, True]


def test_answers_that_a_template_writes_otherwise_once_others_follow_become_samples() -> None:
    sample = conversation("one", "two", "three", "four")
    found = encode(chat_tokenizer(REASONING), sample)
    own = tiny_tokenizer()
    learned = ["".join(own.convert_ids_to_tokens(ids)) for each in found for is_target, ids in each.runs() if is_target]
    assert learned == ["(think)two<e>", "(think)four<e>"]
    for each, last in zip(found, (2, 4), strict=True):
        # What stands before the answer is what the model is given when it has to answer.
        prompt = chat_tokenizer(REASONING).apply_chat_template(
            sample.messages[: last - 1], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert each.ids[: each.is_target.index(True)] == prompt
    # One answer is one sample.
    assert len(encode(chat_tokenizer(REASONING), conversation("one", "two"))) == 1


@every_case("template", ["$A", "<b> $A", "$A <e>", "<b> $A <e>"])
def test_a_completion_and_the_end_after_it_are_learned(template: str) -> None:
    own = tiny_tokenizer(template)
    (found,) = encode(own, Completion("file, line 1", "ab", "cd"))
    start = ["<b>"] if template.startswith("<b>") else []
    assert own.convert_ids_to_tokens(found.ids) == [*start, "a", "b", "c", "d", "<e>"]
    assert found.is_target == [False] * (len(start) + 2) + [True] * 3


def test_what_follows_no_token_is_not_counted() -> None:
    (found,) = encode(tiny_tokenizer(), Completion("file, line 1", "", "abc"))
    assert found.is_target == [True] * 4 and found.num_targets == 3


def test_alpaca_takes_the_chat_template_or_its_own_words() -> None:
    record = Record("file, line 1", {"instruction": "add", "input": "b and c", "output": "d"})
    sample = format_of([record]).sample(record)
    own = tiny_tokenizer()
    (found,) = encode(chat_tokenizer(unmarked(HEADERS)), sample)
    assert "".join(own.convert_ids_to_tokens(found.ids)) == "(user)\nadd\nb and c<e>\n(assistant)\nd<e>\n"
    (found,) = encode(own, sample)
    (_, given), (_, learned) = found.runs()
    assert own.convert_ids_to_tokens(learned) == ["d", "<e>"]
    assert isinstance(sample, Conversation) and sample.without_template is not None
    assert given == own(sample.without_template.prompt).input_ids
    assert sample.without_template.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Input:\nb and c\n\n### Response:\n"
    )


def test_the_same_question_is_the_same_tokens_in_every_format() -> None:
    """Under a chat template; without one, questions and conversations are refused with a way out."""
    ask, say = {"role": "user", "content": "say dog"}, {"role": "assistant", "content": "dog dog"}
    part = {"type": "text", "text": "say dog"}
    tokenizer = chat_tokenizer(unmarked(HEADERS))
    (expected,) = encode(tokenizer, Conversation("file, line 1", [ask, say]))
    for value in (
        *(SAMPLES[name](ask["content"], say["content"]) for name in SAMPLES if name != "prompt-completion"),
        {"prompt": [ask], "completion": [say]},
        {"messages": [ask | {"content": [part]}, say | {"content": [part | {"text": "dog"}, part | {"text": " dog"}]}]},
        {"conversations": [{"from": "human", "value": [part]}, {"from": "gpt", "value": "dog dog"}]},
        {"instruction": "say dog", "context": "", "response": "dog dog"},
    ):
        record = Record("file, line 1", value)
        assert encode(tokenizer, format_of([record]).sample(record)) == [expected]
    for name in ("question-answer", "input-output"):
        record = Record("file, line 1", SAMPLES[name]("a", "b"))
        with pytest.raises(ValueError, match=r"no chat template; .* with --columns prompt=question completion=answer"):
            encode(tiny_tokenizer(), format_of([record]).sample(record))


def test_what_the_assistant_says_in_a_prompt_of_messages_is_given() -> None:
    sample = conversation("a", "b", "c", "d")
    record = Record("file, line 1", {"prompt": sample.messages[:3], "completion": sample.messages[3:]})
    for template in (HEADERS, unmarked(HEADERS)):
        (found,) = encode(chat_tokenizer(template), format_of([record]).sample(record))
        (whole,) = encode(chat_tokenizer(template), sample)
        assert found.ids == whole.ids and found.num_targets == whole.num_targets // 2 == 2
        assert found.is_target[-3:] == whole.is_target[-3:]
    with_tools = record.value | {"tools": [{"name": "f"}]}
    read = format_of([record]).sample(Record("file, line 1", with_tools))
    assert isinstance(read, Conversation) and read.tools == [{"name": "f"}]
    # Beside texts nothing writes tools, and a run says that they are not used.
    texts = Record("file, line 1", {"prompt": "a", "completion": "b", "tools": []})
    assert unused_fields([texts], format_of([texts])) == ["tools"]


@every_case(
    ("template", "sample", "message"),
    [
        (None, conversation("a", "b"), "line 1: found a conversation, but the base's tokenizer has no chat template"),
        (
            BRACKETS,
            conversation("sys a", "b", "c"),
            r"the base's chat template refuses the conversation \(TemplateError: roles must alternate\)",
        ),
        ("{{ messages[0]['text'] + 1 }}", conversation("a", "b"), "refuses the conversation"),
        ("{{ messages | tojson }}", conversation("a", "b"), "message 2: the chat template writes something else than"),
        (
            "{{ messages[0]['content'] }}",
            conversation("a", "b"),
            "message 2: .* leaves out content of this turn of the a",
        ),
        (
            "{% generation %}{% endgeneration %}{{ messages | tojson }}",
            conversation("a", "b"),
            "message 2: the base's chat template leaves out content of this turn of the assistant, which would be lear",
        ),
    ],
    ids=["none", "refuses", "fails", "unrelated_prompt", "leaves_out_the_answer", "marks_nothing"],
)
def test_a_template_that_does_not_serve_is_an_error(template: str, sample: Conversation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(chat_tokenizer(template), sample)
