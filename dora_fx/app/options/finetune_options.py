"""Every option of `dora-fx finetune`, and the checks of their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dora_fx.app.errors import UserError
from dora_fx.app.options.option_groups import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
    flag_of,
)

# By default the held-out loss is measured so often in a run.
_MEASUREMENTS = 5


@dataclass(frozen=True)
class FinetuneOptions(RunOptions, TrainingOptions, AdapterOptions, DataOptions, ModelOptions):
    """Every option of the command; the base classes are the groups that `--help` shows."""

    @property
    def logs(self) -> list[str]:
        """Names of the logs to write."""
        return list(dict.fromkeys(name.strip() for name in self.log.split(",") if name.strip()))

    @property
    def measuring_interval(self) -> int:
        """Steps between measurements of the held-out loss during training; 0 for none."""
        return max(round(self.steps / _MEASUREMENTS), 1) if self.eval_every is None else self.eval_every

    def __post_init__(self) -> None:
        """Raise UserError for a value out of its range."""
        for name, (valid, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not valid(value):
                raise UserError(f"{flag_of(name)}: found {value!r}, expected {expected}")
        if self.demo != "none" and self.data is not None:
            raise UserError("--demo brings its own data; leave out --data, or --demo")
        if self.demo == "none" and self.data is None:
            raise UserError("nothing to train on; give --data FILE, or --demo for data that come along")
        if self.demo != "none" and self.data_format != "auto":
            raise UserError(f"--data-format: found {self.data_format} beside --demo, whose data have their own format")
        _check_columns(self)
        if self.gradient_accumulation % self.dp:
            raise UserError(
                f"--gradient-accumulation: found {self.gradient_accumulation}, expected a multiple of --dp {self.dp}, "
                "whose ranks share the forward passes of a step"
            )
        if (self.tp * self.dp) % (self.ep * self.expert_tensor_parallel):
            raise UserError(
                f"--ep: found {self.ep} with --etp {self.expert_tensor_parallel}, expected a product that divides the "
                f"{self.tp * self.dp} ranks of --tp {self.tp} x --dp {self.dp}, which share the experts"
            )
        if self.patience and not self.measuring_interval:
            raise UserError("--patience: found --eval-every 0, expected measurements during training to count")
        if self.pp > 1 and self.compile == "model":
            raise UserError("--compile model: found --pp above 1, expected the whole model; take --compile layer")
        if self.sequence_parallel and self.tp == 1:
            raise UserError("--sequence-parallel: found --tp 1, expected a tensor-parallel size above 1 to shard over")
        if self.sequence_parallel and self.sequence_length % self.tp:
            raise UserError(
                f"--sequence-length: found {self.sequence_length}, expected a multiple of --tp {self.tp} "
                "with --sequence-parallel"
            )


def _check_columns(options: FinetuneOptions) -> None:
    if options.columns and options.demo != "none":
        raise UserError("--columns: found --demo beside it, whose data have no columns; leave one of them out")
    fields: dict[str, str] = {}
    for name, column in options.columns.items():
        if not name or not column:
            raise UserError(f"--columns: found {name}={column}, expected a field and a column, such as prompt=question")
        if column in fields:
            raise UserError(f"--columns: found the column {column!r} for {fields[column]} and {name}, expected one")
        fields[column] = name


# Whether a value is in its range, and what is expected.
_Check = tuple[Callable[[Any], bool], str]
_POSITIVE: _Check = (lambda value: value > 0, "a positive integer")
_NOT_NEGATIVE: _Check = (lambda value: value >= 0, "zero or a positive integer")
_AMOUNT: _Check = (lambda value: math.isfinite(value) and value >= 0, "zero or a positive number")
_RATE: _Check = (lambda value: math.isfinite(value) and value > 0, "a positive number")
_DECAY: _Check = (lambda value: 0 <= value < 1, "a number from 0 to 1, without 1")


def _or_none(check: _Check) -> _Check:
    valid, expected = check
    return lambda value: value is None or valid(value), expected


_CHECKS: dict[str, _Check] = {
    "tp": _POSITIVE,
    "pp": _POSITIVE,
    "dp": _POSITIVE,
    "ep": _POSITIVE,
    "etp": _or_none(_POSITIVE),
    "sequence_length": _POSITIVE,
    "held_out_fraction": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "max_held_out": _POSITIVE,
    "steps": _POSITIVE,
    "epochs": _or_none(_RATE),
    "batch_size": _POSITIVE,
    "gradient_accumulation": _POSITIVE,
    "lr": _RATE,
    "loraplus_lr_ratio": _RATE,
    "magnitude_lr_ratio": _RATE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _AMOUNT,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_eps": _RATE,
    "max_grad_norm": _AMOUNT,
    "eval_every": _or_none(_NOT_NEGATIVE),
    "patience": _NOT_NEGATIVE,
    "keep": _NOT_NEGATIVE,
    "seed": (lambda value: 0 <= value < 2**63, "an integer from 0 to 2**63 - 1"),
    "save_every": _NOT_NEGATIVE,
    "sample_tokens": _NOT_NEGATIVE,
}
