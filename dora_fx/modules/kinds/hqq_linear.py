"""HQQ's linear layers, recognised by their class's name, since the package need not be installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dora_fx.function import HQQ, QuantisedWeight
from dora_fx.modules.kinds.quantised_linear import QuantisedLinear

_PACKINGS = ("8bit_u8", "4bit_u8", "2bit_u8")


class HQQLinear(QuantisedLinear):
    """Groups along the input features, of 8, 4 or 2 bits."""

    class_module = "hqq.core.quantize"
    class_name = "HQQLinear"

    @classmethod
    def format_problem_maybe(cls, linear: Any) -> str | None:
        if not linear.ready:
            return "found an HQQLinear that is not quantised yet, expected one with a weight"
        meta = linear.meta
        expected = {"axis": (1,), "packing": _PACKINGS, "view_as_float": (False,)}
        expected |= {"quant_scale": (False,), "quant_zero": (False,)}
        for name, values in expected.items():
            if meta[name] not in values:
                return (
                    f"found an HQQLinear with {name} = {meta[name]!r}, expected one of {list(values)}: rows of others "
                    "are not read"
                )
        out_features, in_features = meta["shape"]
        group_size = meta["group_size"]
        if in_features % group_size or meta["scale"].numel() != out_features * in_features // group_size:
            return (
                f"found an HQQLinear with groups of {group_size} of {in_features} input features and "
                f"{meta['scale'].numel()} scales, expected a scale for each group of a row"
            )
        return None

    @classmethod
    def stored_weight(cls, linear: Any) -> QuantisedWeight:
        meta = linear.meta
        out_features, in_features = meta["shape"]
        return QuantisedWeight(
            (linear.W_q, meta["scale"], meta["zero"]),
            HQQ,
            (out_features, in_features),
            meta["compute_dtype"],
            (meta["nbits"], meta["group_size"]),
        )

    @staticmethod
    def prepare(linear: Any) -> None:
        # HQQ quantises in inference mode, and autograd keeps no tensor that was made there.
        if not linear.ready:
            return
        if linear.W_q.is_inference():
            linear.W_q = nn.Parameter(linear.W_q.data.clone(), requires_grad=False)
        for name, value in linear.meta.items():
            if isinstance(value, torch.Tensor) and value.is_inference():
                linear.meta[name] = value.clone()

    @staticmethod
    def product_eps(linear: Any, x: torch.Tensor) -> float:
        return torch.finfo(linear.meta["compute_dtype"]).eps
