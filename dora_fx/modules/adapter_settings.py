"""The ways to initialise an adapter, its scaling, and the checks of its settings, which `DoRA` and adapters share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

from torch import nn

INIT_METHODS: dict[str, Callable[..., Any]] = {
    "xavier": nn.init.xavier_normal_,
    "normal": lambda tensor, generator: nn.init.normal_(tensor, mean=0.0, std=0.2, generator=generator),
    "kaiming": lambda tensor, generator: nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator),
    "zero": lambda tensor, generator: nn.init.zeros_(tensor),
}


def low_rank_scaling(alpha: float, dim: int, use_rslora: bool) -> float:
    """Return the factor of the low-rank product: alpha / dim, or alpha / sqrt(dim) (rsLoRA, arXiv 2312.03732)."""
    return alpha / math.sqrt(dim) if use_rslora else alpha / dim


def check_dim(name: str, value: object) -> None:
    """Raise ValueError, naming the setting, unless a rank of the low-rank product is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}: found {value!r}, expected a positive integer")


def check_alpha(name: str, value: object) -> None:
    """Raise ValueError, naming the setting, unless a numerator of the scaling is a positive finite number."""
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: found {value!r}, expected a positive finite number")


def check_dropout(name: str, value: object) -> None:
    """Raise ValueError, naming the setting, unless a probability of dropout is in [0, 1)."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: found {value!r}, expected a probability in [0, 1)")


def check_use_rslora(name: str, value: object) -> None:
    """Raise TypeError, naming the setting, unless a value is True or False: other values would be taken for one."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r}, expected True or False")


def check_init_method(name: str, value: object) -> None:
    """Raise ValueError, naming the setting, unless a way to initialise is one of `INIT_METHODS`."""
    if not isinstance(value, str) or value not in INIT_METHODS:
        raise ValueError(f"{name}: found {value!r}, expected one of {sorted(INIT_METHODS)}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
