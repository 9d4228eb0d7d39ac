"""Chat templates of somebody else, rendered within limits.

transformers runs a template in a sandbox of jinja2, which keeps it from files and from Python's objects, and from
nothing else: `{{ 'a' * 10**10 }}`, `{{ ''.center(2000000000) }}` and two nested loops take the machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dora_fx.files import UnsafeFileError, bounded

# Thousands of times what templates take.
_SECONDS, _MEBIBYTES, _MOST_CHARACTERS = 10.0, 512, 1 << 24
# Options that say what becomes of the text.
_OF_TOKENS = ("tokenize", "return_dict", "return_assistant_tokens_mask", "return_tensors")


def apply_chat_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """What `tokenizer.apply_chat_template` gives, once the text is known to be of an ordinary size.

    Args:
        tokenizer: transformers', with a template.
        messages: of one conversation.
        options: of the method.

    Raises:
        UnsafeFileError: rendering takes too long, too much memory, or makes a text that no model has room for.
        Exception: of the template, as the method.
    """
    what = f"{tokenizer.name_or_path}: the chat template"
    plain = {name: value for name, value in options.items() if name not in _OF_TOKENS}
    with bounded(what, seconds=_SECONDS, mebibytes=_MEBIBYTES):
        _check_operators(tokenizer.get_chat_template(tools=options.get("tools")), what)
        text = tokenizer.apply_chat_template(messages, tokenize=False, **plain)
    if len(text) > _MOST_CHARACTERS:
        raise UnsafeFileError(f"{what} makes {len(text):,} characters, expected at most {_MOST_CHARACTERS:,}")
    return tokenizer.apply_chat_template(messages, **options) if options.get("tokenize", True) else text


@lru_cache(maxsize=8)
def _check_operators(template: str, what: str) -> None:
    """Refuse powers, of which one operation takes hours without memory; no signal interrupts it."""
    from jinja2 import Environment

    if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template)):
        raise UnsafeFileError(f"{what} has the operator **, expected those that texts need")
