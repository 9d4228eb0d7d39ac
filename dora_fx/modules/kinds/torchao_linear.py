"""`torch.nn.Linear` with a weight that torchao quantised: the layer's class stays, and the weight's class tells."""

from __future__ import annotations

from typing import Any

from torch import nn

from dora_fx.function import TORCHAO, QuantisedWeight
from dora_fx.modules.kinds.linear_kind import LinearSpec
from dora_fx.modules.kinds.quantised_linear import QuantisedLinear
from dora_fx.modules.kinds.torch_linear import TorchLinear

_PACKAGE = "torchao"
# Classes of weights whose rows can be dequantised, and attributes of theirs that say that inputs are quantised too.
_QUANTISES_INPUT = {
    "IntxUnpackedToInt8Tensor": "activation_quantization",
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
}


class TorchAOLinear(QuantisedLinear):
    """Weights of 8 and 4 bits and of float8; inputs are not quantised."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return TorchLinear.matches(module) and type(module.weight).__module__.partition(".")[0] == _PACKAGE

    @classmethod
    def describe(cls, path: str, linear: Any) -> LinearSpec:
        spec, found = super().describe(path, linear), type(linear.weight).__name__
        if (setting := getattr(linear.weight, _QUANTISES_INPUT[found], None)) is not None:
            raise ValueError(
                f"{path}: found a base weight of torchao's class {found} that has its input quantised as well "
                f"({_QUANTISES_INPUT[found]} = {setting}), expected a weight-only configuration"
            )
        return spec

    @classmethod
    def format_problem_maybe(cls, linear: Any) -> str | None:
        found = type(linear.weight).__name__
        if found in _QUANTISES_INPUT:
            return None
        return (
            f"found a base weight of torchao's class {found}, expected a plain one or one of {list(_QUANTISES_INPUT)}, "
            "which IntxWeightOnlyConfig, Int8WeightOnlyConfig and Float8WeightOnlyConfig make: the rows of others "
            "cannot be read, or calls give no gradients"
        )

    @classmethod
    def stored_weight(cls, linear: Any) -> QuantisedWeight:
        shape = (linear.out_features, linear.in_features)
        return QuantisedWeight((linear.weight,), TORCHAO, shape, linear.weight.dtype, ())
