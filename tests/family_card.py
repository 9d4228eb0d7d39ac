"""Prints how far each family of models is from transformers and PEFT: `python -m tests.family_card`.

Tiny models with random weights in float32, on one rank. An error is relative to the norm of what is expected, and the
largest of a row's tensors. The tests hold them to the bound of `tests/closeness.py`, which the last column has.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch

import dora_fx
from dora_fx.megatron import megatron_world
from tests.closeness import relative_error, rounding, roundings_of
from tests.hf_models import CONFIGS
from tests.peft_models import (
    adapted_megatron,
    base_model,
    beside_peft,
    hf_logits,
    load_with_peft,
    megatron_logits,
    megatron_of,
    save_peft_adapter,
)

HEADER = ("model", "base", "adapted", "loss", "gradients", "bound of the base")


def errors_of(kind: str, folder: Path) -> list[float | None]:
    """Return the errors of a row: of Megatron's logits, without and with adapters, and of a transformers model."""
    hf = base_model(kind)
    errors: list[float | None] = [None, None]
    if kind in CONFIGS:
        adapted = adapted_megatron(hf)
        dora_fx.export_hf(adapted, folder / "ours")
        peft_logits = hf_logits(load_with_peft(hf, folder / "ours"))
        errors = [
            relative_error(megatron_logits(megatron_of(hf)), hf_logits(hf)),
            relative_error(megatron_logits(adapted), peft_logits),
        ]
    expected = save_peft_adapter(hf, folder / "theirs", target_modules="all-linear")
    ours, theirs = beside_peft(dora_fx.import_hf(copy.deepcopy(hf), folder / "theirs"), expected)
    errors.append(relative_error(ours.pop("loss"), theirs.pop("loss")))
    errors.append(max(relative_error(ours[name], gradient) for name, gradient in theirs.items()))
    return [*errors, rounding(torch.float32, roundings_of(hf))]


def main() -> None:
    print("| " + " | ".join(HEADER) + " |\n|---|" + "--:|" * (len(HEADER) - 1))
    with megatron_world("cpu", seed=1234):
        for kind in (*CONFIGS, "gemma"):
            with tempfile.TemporaryDirectory() as folder:
                errors = errors_of(kind, Path(folder))
            cells = ["refused" if error is None else f"{error:.1e}" for error in errors]
            print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
