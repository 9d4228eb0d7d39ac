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


def unmarked(template: str) -> str:
    """A template without its marks of what the assistant says."""
    return re.sub(r"\{% (end)?generation %\}", "", template)


def chat_tokenizer(template: str | None) -> Any:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
