"""Chat templates of the kinds that bases come with, small enough for the tiny tokenizer."""

from __future__ import annotations

import re
from typing import Any

from tests.hf_models import tiny_tokenizer

# As most of today's: a header, the text, a mark of the end and a line break.
HEADERS = (
    "{% for m in messages %}{{ '(' + m['role'] + ')\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<e>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<e>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)\n' }}{% endif %}"
)
# As Llama 2's: no header before the answer, only a mark after the question; roles have to alternate.
BRACKETS = (
    "{{ '<b>' }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '(I) ' + m['content'] + ' (E)' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] + ' <e>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
# As Qwen 3's: the last answer starts with its reasoning, which earlier ones do not keep.
REASONING = (
    "{% for m in messages %}{{ '(' + m['role'] + ')' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(think)' }}{% endif %}"
    "{{ m['content'] + '<e>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)
# As Qwen's: tools before all turns, an answer's reasoning, text and calls, and results of tools as the user's turns.
TOOLS = (
    "{% if tools %}{{ '(system)\n' }}{% for t in tools %}{{ t | tojson + ' ' }}{% endfor %}{{ '<e>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '(assistant)\n' }}{% generation %}"
    "{% if m.reasoning_content %}{{ '(think)' + m.reasoning_content + '(end)' }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls %}{% set f = call.function or call %}"
    "{{ '(call)' + f.name + ' ' + f.arguments | tojson + '(end)' }}{% endfor %}{{ '<e>' }}{% endgeneration %}"
    "{% elif m.role == 'tool' %}{{ '(user)\n(result)' + m.content + '<e>' }}"
    "{% else %}{{ '(' + m.role + ')\n' + m.content + '<e>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)\n' }}{% endif %}"
)
# As Llama 3.1's: one call in a turn, in place of its text, and roles of its own for results.
ONE_CALL = (
    "{{ '<b>' }}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{{ '(assistant)' }}{% generation %}"
    "{{ m.tool_calls[0].function | tojson }}{{ '<e>' }}{% endgeneration %}"
    "{% elif m.role == 'tool' %}{{ '(ipython)' + m.content | tojson + '<e>' }}"
    "{% elif m.role == 'assistant' %}{{ '(assistant)' }}{% generation %}{{ m.content + '<e>' }}{% endgeneration %}"
    "{% else %}{{ '(' + m.role + ')' + (tools | tojson if tools and loop.first else '') + m.content + '<e>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)
# As DeepSeek's: arguments of a call are joined to a text.
JOINED = TOOLS.replace("f.arguments | tojson", "f.arguments")


def unmarked(template: str) -> str:
    """A template without its marks of what the assistant says."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


def chat_tokenizer(template: str | None) -> Any:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
