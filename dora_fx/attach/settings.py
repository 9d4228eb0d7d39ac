"""The settings of a DoRA configuration, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from dora_fx.modules.adapter import INIT_METHODS
from dora_fx.modules.partial_gradients import CompleteGradients


@dataclass
class DoRASettings:
    """The choice of layers to adapt and how to adapt them; see `DoRA`, which has them."""

    target_modules: Sequence[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    exclude_modules: Sequence[str] = field(default_factory=list)
    dim: int = 32
    alpha: float = 64
    dropout: float = 0.0
    dropout_position: Literal["pre"] = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    allow_unmatched: bool = False
    complete_gradients: CompleteGradients = "every_backward"

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        """Raise for a field out of its range."""
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"DoRA.{name}: found {value!r}, expected a list of names")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim <= 0:
            raise ValueError(f"DoRA.dim: found {self.dim!r}, expected a positive integer")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"DoRA.alpha: found {self.alpha!r}, expected a positive finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"DoRA.dropout: found {self.dropout!r}, expected a probability in [0, 1)")
        if self.dropout_position != "pre":
            raise ValueError(f"DoRA.dropout_position: found {self.dropout_position!r}, expected 'pre'")
        if self.complete_gradients not in get_args(CompleteGradients):
            raise ValueError(
                f"DoRA.complete_gradients: found {self.complete_gradients!r}, "
                f"expected one of {list(get_args(CompleteGradients))}"
            )
        for name in ("lora_A_init_method", "lora_B_init_method"):
            if getattr(self, name) not in INIT_METHODS:
                raise ValueError(f"DoRA.{name}: found {getattr(self, name)!r}, expected one of {sorted(INIT_METHODS)}")
