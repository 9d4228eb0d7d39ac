"""The DoRA function: where its tensors lie, their collectives, norms, scales and dropout, and the formula."""

from dora_fx.function.base_weight import BaseWeight, QuantisedWeight, sources_of, tensors_of, whole_of
from dora_fx.function.collectives import (
    DEPEND_ON_RANK,
    all_reduce_coalesced,
    gather_rows_coalesced,
    reduce_scatter_rows,
)
from dora_fx.function.dropout import DropoutFactors
from dora_fx.function.formula import adapted_linear
from dora_fx.function.grouped_formula import drop_tokens, grouped_adapted_linear
from dora_fx.function.grouped_products import grouped_product
from dora_fx.function.input_norm import InputNorm
from dora_fx.function.mixture import MixedOperands, Samples, mix
from dora_fx.function.placement import ADAPTER_TENSORS, LAYOUTS, Layout, ParameterPlacement, shard
from dora_fx.function.row_scale import RowScale, magnitude_delta, scale_rows
from dora_fx.function.site_parameters import (
    CachedParameters,
    SiteOperands,
    StoredParameters,
    complete_parameters,
    measured_base_norm,
    row_norms,
)
from dora_fx.function.weight_formats import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, HQQ, TORCHAO
from dora_fx.function.weight_norm import base_norm_squared, norm_dtype

__all__ = [
    "ADAPTER_TENSORS",
    "BITSANDBYTES_4BIT",
    "BITSANDBYTES_8BIT",
    "DEPEND_ON_RANK",
    "HQQ",
    "LAYOUTS",
    "TORCHAO",
    "BaseWeight",
    "CachedParameters",
    "DropoutFactors",
    "InputNorm",
    "Layout",
    "MixedOperands",
    "ParameterPlacement",
    "QuantisedWeight",
    "RowScale",
    "Samples",
    "SiteOperands",
    "StoredParameters",
    "adapted_linear",
    "all_reduce_coalesced",
    "base_norm_squared",
    "complete_parameters",
    "drop_tokens",
    "gather_rows_coalesced",
    "grouped_adapted_linear",
    "grouped_product",
    "magnitude_delta",
    "measured_base_norm",
    "mix",
    "norm_dtype",
    "reduce_scatter_rows",
    "row_norms",
    "scale_rows",
    "shard",
    "sources_of",
    "tensors_of",
    "whole_of",
]
