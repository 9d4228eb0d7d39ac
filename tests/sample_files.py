"""Files of samples in every format, and options that train a tiny base on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chat_templates import HEADERS, unmarked
from tests.hf_models import save_tiny_checkpoint

WORDS = ("dog", "cat", "fox", "owl", "bee")


def texts(number: int) -> tuple[str, str]:
    """A question and its answer, of lengths that vary."""
    word = WORDS[number % len(WORDS)]
    return f"say {word}", " ".join([word] * (1 + number % 3))


SAMPLES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": lambda ask, say: {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    },
    "sharegpt": lambda ask, say: {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]},
    "prompt-completion": lambda ask, say: {"prompt": f"{ask}: ", "completion": say},
    "alpaca": lambda ask, say: {"instruction": ask, "input": "", "output": say},
    "instruction-response": lambda ask, say: {"instruction": ask, "response": say},
    "question-answer": lambda ask, say: {"question": ask, "answer": say},
    "input-output": lambda ask, say: {"input": ask, "output": say},
}


def write_inputs(folder: Path) -> Path:
    """Write two bases, of which `base` has a chat template and `plain` none, and a file of every format."""
    save_tiny_checkpoint(folder / "plain")
    save_tiny_checkpoint(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(unmarked(HEADERS))
    for name, sample in SAMPLES.items():
        write(folder / f"{name}.jsonl", [sample(*texts(number)) for number in range(40)])
    return folder


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def options(folder: Path, data: str | Path, *more: object, base: str = "base") -> list[object]:
    sizes = ("--sequence-length", 120, "--sample-tokens", 3, "--device", "cpu", "--compile", "none", "--lr", 0.01)
    return ["--base", folder / base, "--data", folder / data, *sizes, *more]
