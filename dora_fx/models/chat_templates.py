"""Renders untrusted chat templates within limits of time, memory and length.

transformers runs a template in jinja2's sandbox, which denies access to files and Python's internals but does not limit
time or memory: `{{ 'a' * 10**10 }}`, `{{ ''.center(2000000000) }}` or two nested loops can exhaust the machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dora_fx.files import UnsafeFileError, bounded

# Thousands of times what real templates need.
_SECONDS, _MEBIBYTES, _MOST_CHARACTERS = 10.0, 512, 1 << 24
# Options for what happens to the rendered text.
_OF_TOKENS = ("tokenize", "return_dict", "return_assistant_tokens_mask", "return_tensors")


def apply_chat_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Call `tokenizer.apply_chat_template`, after a check that the rendered text has an ordinary size.

    Args:
        tokenizer: transformers', with a template.
        messages: of one conversation.
        options: of the method.

    Raises:
        UnsafeFileError: rendering takes too long or too much memory, or makes a text longer than any model reads.
        Exception: the template's own errors, as the method raises them.
    """
    what = f"{tokenizer.name_or_path}: the chat template"
    plain = {name: value for name, value in options.items() if name not in _OF_TOKENS}
    with bounded(what, seconds=_SECONDS, mebibytes=_MEBIBYTES):
        _check_operators(tokenizer.get_chat_template(tools=options.get("tools")), what)
        text = tokenizer.apply_chat_template(messages, tokenize=False, **plain)
    if len(text) > _MOST_CHARACTERS:
        raise UnsafeFileError(f"{what} makes {len(text):,} characters, expected at most {_MOST_CHARACTERS:,}")
    # The text is rendered once more for the options that concern tokens; now its size is known.
    return tokenizer.apply_chat_template(messages, **options) if options.get("tokenize", True) else text


@lru_cache(maxsize=8)
def _check_operators(template: str, what: str) -> None:
    """Refuse powers: a single one can take hours, and no signal interrupts it."""
    from jinja2 import Environment

    if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template)):
        raise UnsafeFileError(f"{what}: found the operator **, expected a template without powers")
