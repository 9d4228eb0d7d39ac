"""What layers of quantised weights have in common: they are called, and every rank holds them whole."""

from __future__ import annotations

from typing import Any

from dora_fx.modules.kinds.linear_kind import LinearSpec
from dora_fx.modules.kinds.torch_linear import TorchLinear


class QuantisedLinear(TorchLinear):
    """A layer whose weight is quantised in a format that `format_problem_maybe` knows, or refuses."""

    @classmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        if (problem := cls.format_problem_maybe(linear)) is not None:
            raise ValueError(f"{path}: {problem}")
        return super().describe(path, linear)

    @classmethod
    def is_product_alone(cls, linear: Any) -> bool:
        return False
