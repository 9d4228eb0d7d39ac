"""The settings of a DoRA configuration, with the checks of their values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dora_fx.attach.matching import ALL_LINEAR, matches
from dora_fx.modules import (
    GradientCompletion,
    check_alpha,
    check_dim,
    check_dropout,
    check_init_method,
    check_use_rslora,
)


@dataclass
class DoRASettings:
    """The fields of `DoRA`, which documents them: the layers to adapt, and how to adapt them."""

    target_modules: Sequence[str] | Literal["all-linear"] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    exclude_modules: Sequence[str] = ()
    dim: int = 32
    alpha: float = 64
    dropout: float = 0.0
    dropout_position: Literal["pre"] = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    allow_unmatched: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    complete_gradients: GradientCompletion = "auto"

    def __post_init__(self) -> None:
        self._check()

    def dim_of(self, path: str) -> int:
        """Return the rank at a path of the whole model: of the first pattern that names it, or `dim`."""
        return _by_pattern(self.rank_pattern, path, self.dim)

    def alpha_of(self, path: str) -> float:
        """Alpha at a path of the whole model: of the first pattern that names it, or `alpha`."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)

    def idle_patterns(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """Return the patterns that decide for none of the paths, as pairs of field name and pattern."""
        idle = []
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            used = {_first_maybe(patterns, path) for path in paths}
            idle += [(name, pattern) for pattern in patterns if pattern not in used]
        return idle

    def _check(self) -> None:
        """Raise for a field out of its range."""
        if self.target_modules == ALL_LINEAR:
            self.target_modules = [ALL_LINEAR]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if (
                isinstance(value, str)
                or not isinstance(value, Collection)
                or not all(isinstance(v, str) for v in value)
            ):
                raise TypeError(f"DoRA.{name}: found {value!r}, expected a list of names")
        check_dim("DoRA.dim", self.dim)
        check_alpha("DoRA.alpha", self.alpha)
        for name, check in (("rank_pattern", check_dim), ("alpha_pattern", check_alpha)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"DoRA.{name}: found {patterns!r}, expected numbers by names, paths or patterns")
            for pattern, value in patterns.items():
                check(f"DoRA.{name}[{pattern!r}]", value)
        check_use_rslora("DoRA.use_rslora", self.use_rslora)
        check_dropout("DoRA.dropout", self.dropout)
        if self.dropout_position != "pre":
            raise ValueError(f"DoRA.dropout_position: found {self.dropout_position!r}, expected 'pre'")
        if self.complete_gradients not in get_args(GradientCompletion):
            raise ValueError(
                f"DoRA.complete_gradients: found {self.complete_gradients!r}, "
                f"expected one of {list(get_args(GradientCompletion))}"
            )
        for name in ("lora_A_init_method", "lora_B_init_method"):
            check_init_method(f"DoRA.{name}", getattr(self, name))


def _first_maybe(patterns: Mapping[str, Any], path: str) -> str | None:
    return next((pattern for pattern in patterns if matches(pattern, path)), None)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    first = _first_maybe(patterns, path)
    return default if first is None else patterns[first]
