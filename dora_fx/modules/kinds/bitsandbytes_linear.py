"""bitsandbytes' linear layers of 4 and of 8 bits, recognised by class names, since the package need not be installed.

The layer's own call is the base product, in eager and in compiled code: it dequantises as it goes, and keeps what is
stored for the backward pass. DoRA takes its output as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from dora_fx.function import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, QuantisedWeight
from dora_fx.modules.kinds.quantised_linear import QuantisedLinear

# A format of its own that a layer's weight is in after an evaluation on a CPU with AVX512-BF16.
_REPACKED = (
    "found a weight that an evaluation repacked in place for AVX512-BF16: its scales are rounded, calls give no "
    "gradient for their input, and its rows cannot be read. Expected one as it was loaded: load the model again, and "
    "call DoRA on it before it is evaluated"
)


_MODULE = "bitsandbytes.nn.modules"


class BitsAndBytes4bit(QuantisedLinear):
    """NF4 and FP4, their scales quantised again or not."""

    class_module = _MODULE
    class_name = "Linear4bit"
    _class_names = ("Linear4bit", "LinearNF4", "LinearFP4")

    @classmethod
    def matches(cls, module: torch.nn.Module) -> bool:
        found = type(module)
        return found.__module__ == cls.class_module and found.__qualname__ in cls._class_names

    @classmethod
    def stored_weight(cls, linear: Any) -> QuantisedWeight:
        weight = linear.weight
        state = weight.quant_state
        tensors: tuple[torch.Tensor, ...] = (weight, state.absmax)
        nested_blocksize = 0
        if state.nested:
            tensors += (state.offset, state.state2.absmax, state.state2.code)
            nested_blocksize = state.state2.blocksize
        return QuantisedWeight(
            tensors,
            BITSANDBYTES_4BIT,
            (linear.out_features, linear.in_features),
            state.dtype,
            (state.blocksize, state.quant_type, nested_blocksize),
        )

    @classmethod
    def format_problem_maybe(cls, linear: Any) -> str | None:
        if getattr(linear.weight, "quant_state", None) is None:
            return "found a Linear4bit whose weight is not quantised yet, expected one that was moved to its device"
        return cls.gradient_problem_maybe(linear)

    @staticmethod
    def gradient_problem_maybe(linear: Any) -> str | None:
        state = getattr(linear.weight, "quant_state", None)
        return _REPACKED if getattr(state, "packing_format_for_cpu", False) else None

    @classmethod
    def call_problem_maybe(cls, linear: Any) -> str | None:
        return cls.gradient_problem_maybe(linear)

    @staticmethod
    def prepare(linear: Any) -> None:
        # Otherwise the first evaluation on a CPU with AVX512-BF16 repacks the weight in place.
        linear.support_avx512bf16_for_cpu = False

    @staticmethod
    def product_eps(linear: Any, x: torch.Tensor) -> float:
        return torch.finfo(linear.compute_dtype or x.dtype).eps


class BitsAndBytes8bit(QuantisedLinear):
    """LLM.int8(): a call rounds its input to 8 bits as well."""

    class_module = _MODULE
    class_name = "Linear8bitLt"

    @classmethod
    def stored_weight(cls, linear: Any) -> QuantisedWeight:
        # The first call moves the scales from the weight to the layer's state.
        scales = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
        # Neither says what dtype the weight had. Float32 holds what adapters learn in any model.
        shape = (linear.out_features, linear.in_features)
        return QuantisedWeight((linear.weight, scales), BITSANDBYTES_8BIT, shape, torch.float32, ())

    @classmethod
    def format_problem_maybe(cls, linear: Any) -> str | None:
        if linear.state.has_fp16_weights:
            return "found a Linear8bitLt with has_fp16_weights=True, expected False: its weight is no quantised one"
        if linear.weight.dtype != torch.int8:
            return "found a Linear8bitLt whose weight is not quantised yet, expected one that was moved to its device"
        return None

    @staticmethod
    def prepare(linear: Any) -> None:
        # What the first call does; compiled code would be traced again after it.
        if linear.weight.CB is not None:
            linear.init_8bit_state()

    @staticmethod
    def product_eps(linear: Any, x: torch.Tensor) -> float:
        return 1.0 / 127.0
