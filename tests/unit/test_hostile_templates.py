"""Chat templates that take a machine's memory or time are given up with one line, and the process goes on."""

from __future__ import annotations

import resource
import signal

import pytest

from dora_fx.files.bounds import bounded
from dora_fx.files.regular_file import UnsafeFileError
from dora_fx.models.chat_templates import apply_chat_template
from tests.hf_models import tiny_tokenizer
from tests.unit.hostile_files import is_endless

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# The template, and the refusal; what transformers makes of it is tried within 300 MiB and two seconds.
TEMPLATES = {
    "power": ("{{ 'a' * 10**10 }}", r"found the operator \*\*"),
    "power of powers": ("{% set a = 9 %}{{ a ** (a ** a) > 1 }}", r"found the operator \*\*"),
    "product": ("{{ 'a' * 10000000000 }}", "takes more than 512 MiB of memory"),
    "center": ("{{ 'a'.center(2000000000) }}", "takes more than 512 MiB of memory"),
    "filter": ("{{ 'a' | center(2000000000) }}", "takes more than 512 MiB of memory"),
    "format": ("{{ '%2000000000d' % 1 }}", "takes more than 512 MiB of memory"),
    "list": ("{{ ([1] * 1000000000) | length }}", "takes more than 512 MiB of memory"),
    "doubled": (
        "{% set n = namespace(a='aaaaaaaa') %}{% for _ in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "takes more than 512 MiB of memory",
    ),
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0.5 seconds",
    ),
    "long": ("{{ 'a' * 20000000 }}", "makes 20,000,000 characters, expected at most 16,777,216"),
}
RENDER = (
    "import sys\nfrom tests.hf_models import tiny_tokenizer\npass\nfound = tiny_tokenizer()\n"
    "found.chat_template = sys.argv[1]\nfound.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=True)"
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_endless_templates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, message = TEMPLATES[name]
    assert is_endless(RENDER, template, mebibytes=300)
    monkeypatch.setattr("dora_fx.models.chat_templates._SECONDS", 0.5 if name == "loops" else 20.0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(UnsafeFileError, match=rf"the chat template:? {message}"):
        apply_chat_template(tokenizer, MESSAGES, tokenize=True)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_ordinary_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '-' * 3 }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
    )
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    expected = tokenizer.apply_chat_template(MESSAGES, **options)
    assert dict(apply_chat_template(tokenizer, MESSAGES, **options)) == dict(expected)
    assert apply_chat_template(tokenizer, MESSAGES, tokenize=False) == "---a---b"


def test_a_timer_of_the_caller_goes_on() -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with bounded("a", seconds=1, mebibytes=512):
            pass
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
