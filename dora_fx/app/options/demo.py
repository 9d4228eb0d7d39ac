"""The demos of `dora-fx finetune --demo`: their names, and what their data are trained with."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

# What the data of `--demo` are trained with. Neither has its prompt: what follows is not quoted, and shows in whose
# voice or style the model writes.
DEMO_DEFAULTS: dict[str, dict[str, Any]] = {
    "pirate": {
        "steps": 8,
        "lr": 1e-3,
        "warmup_steps": 1,
        "sequence_length": 64,
        "held_out_fraction": 0.2,
        "max_held_out": 16,
        "check": True,
        "prompt": "What is the capital of Scotland?",
    },
    "text": {
        "steps": 60,
        "check": True,
        "sample_tokens": 48,
        "prompt": "Dictionaries map keys to values.",
    },
}


class DemoName:
    """The type of `--demo` for its parser, which prints it in the help."""

    def __call__(self, value: object) -> str:
        """Return the name of a demo; older files of options have a boolean, which was whether to train on the text."""
        name = {True: "text", False: "none"}[value] if isinstance(value, bool) else value
        if name not in ("none", *DEMO_DEFAULTS):
            raise ArgumentTypeError(f"found the demo {name!r}, expected {self!r}")
        return str(name)

    def __repr__(self) -> str:
        return " or ".join(DEMO_DEFAULTS)
