"""`torch.nn.Linear`: every rank holds the whole layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from dora_fx.function import LAYOUTS
from dora_fx.modules.kinds.linear_kind import LinearKind, LinearSpec, runs_its_class_alone


class TorchLinear(LinearKind):
    class_module = nn.Linear.__module__
    class_name = nn.Linear.__qualname__

    @classmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        return LinearSpec(
            kind=cls,
            layout=LAYOUTS[cls.layout_name(linear)],
            in_features=linear.in_features,
            out_features=linear.out_features,
            padded_in_features=0,
            padded_out_features=0,
            row_blocks=1,
            tp_group=None,
            weight=cls.stored_weight(linear),
            bias=linear.bias,
        )

    @staticmethod
    def layout_name(linear: Any) -> str:
        return "replicated"

    @classmethod
    def is_product_alone(cls, linear: Any) -> bool:
        return TorchLinear.matches(linear) and runs_its_class_alone(linear)
