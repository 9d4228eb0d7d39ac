"""Attributes of a linear layer that code without knowledge of adapters reads and sets.

transformers ties and resizes embeddings, Megatron switches an output layer's sequence parallelism off for one call:
an adapted layer answers with its base layer's attributes and hands new values on to it. A value that would change the
adapted function, or part the adapter from its layer, is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def _attribute(name: str) -> Any:
    def read(self: BaseAttributes) -> Any:
        return getattr(self.to_wrap, name)

    def write(self: BaseAttributes, value: Any) -> None:
        setattr(self.to_wrap, name, value)

    return property(read, write, doc=f"The base layer's `{name}`, if it has one.")


def _fixed_attribute(name: str) -> Any:
    def read(self: BaseAttributes) -> Any:
        return getattr(self.to_wrap, name)

    def write(self: BaseAttributes, value: Any) -> None:
        found = getattr(self.to_wrap, name)
        if value != found:
            raise ValueError(
                f"{self.path}: found {name} = {value!r} set on an adapted layer, expected {found!r} to stay; resize or "
                "rebuild the layer before DoRA is called on the model or after dora_fx.merge, or exclude it from DoRA"
            )

    return property(read, write, doc=f"The base layer's `{name}`, if it has one; it cannot be changed.")


class BaseAttributes(nn.Module):
    """A module that stands in for the layer `to_wrap` and has its attributes.

    Attributes:
        to_wrap: a layer of one of `kinds.KINDS`.
        path: of the module, for error messages.
    """

    to_wrap: Any
    path: str
    # In a tuple, so that a borrowed parameter is not registered twice.
    _borrowed_weight: tuple[nn.Parameter | None]

    in_features, out_features = _fixed_attribute("in_features"), _fixed_attribute("out_features")
    input_size, output_size = _fixed_attribute("input_size"), _fixed_attribute("output_size")
    input_size_per_partition = _fixed_attribute("input_size_per_partition")
    output_size_per_partition = _fixed_attribute("output_size_per_partition")
    input_is_parallel = _fixed_attribute("input_is_parallel")
    is_expert, explicit_expert_comm = _fixed_attribute("is_expert"), _fixed_attribute("explicit_expert_comm")
    tp_group = _fixed_attribute("tp_group")
    config = _attribute("config")
    gather_output = _attribute("gather_output")
    sequence_parallel = _attribute("sequence_parallel")
    skip_bias_add = _attribute("skip_bias_add")
    # Of Megatron's layers over Transformer Engine.
    parallel_mode, tp_size = _fixed_attribute("parallel_mode"), _fixed_attribute("tp_size")
    normalization, eps = _fixed_attribute("normalization"), _fixed_attribute("eps")
    zero_centered_gamma = _fixed_attribute("zero_centered_gamma")
    use_bias, te_return_bias = _fixed_attribute("use_bias"), _fixed_attribute("te_return_bias")
    te_quant_params, _tp_group = _fixed_attribute("te_quant_params"), _fixed_attribute("_tp_group")
    is_first_microbatch = _attribute("is_first_microbatch")
    layer_norm_weight, layer_norm_bias = _attribute("layer_norm_weight"), _attribute("layer_norm_bias")

    @property
    def ub_name(self) -> Any:
        """The base layer's `ub_name` is read to build another layer in its place: ValueError where it has one."""
        self.to_wrap.ub_name  # noqa: B018
        raise ValueError(
            f"{self.path}: found an adapted layer where another one is built of its weights, as Megatron splits one "
            "into norm and product, expected a plain layer: the copy would have no adapter. Merge it first"
        )

    @property
    def base_weight(self) -> torch.Tensor:
        """W0, or this rank's shard of it; the borrowed one where the layer has none of its own."""
        weight = self.to_wrap.weight if self.to_wrap.weight is not None else self._borrowed_weight[0]
        if weight is None:
            raise ValueError(f"{self.path}: the layer has no weight of its own and none was passed")
        return weight

    @property
    def weight(self) -> nn.Parameter | None:
        """The base layer's own weight, None where the layer borrows one.

        It may be set to a parameter of the same values, as tying does. Raises ValueError for others.
        """
        return self.to_wrap.weight

    @weight.setter
    def weight(self, value: nn.Parameter | None) -> None:
        if isinstance(value, torch.Tensor) and not _is_same(value, self.base_weight):
            found = f"a {value.dtype} one of shape {tuple(value.shape)} on {value.device}"
            raise ValueError(
                f"{self.path}: found another weight set on an adapted layer ({found}), expected one of the values that "
                "it has, as tying gives: the magnitudes belong to the norms of these. Load others with "
                "load_state_dict, or set them before DoRA is called on the model or after dora_fx.merge"
            )
        self.to_wrap.weight = value

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias, None without one. It is added unscaled, so any may be set."""
        return self.to_wrap.bias

    @bias.setter
    def bias(self, value: nn.Parameter | None) -> None:
        self.to_wrap.bias = value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; those of the layer itself, as `layer.weight = parameter` comes here, are the base's."""
        if name in ("weight", "bias", "layer_norm_weight", "layer_norm_bias"):
            getattr(BaseAttributes, name).fset(self, param)
        else:
            super().register_parameter(name, param)


def _is_same(value: torch.Tensor, base: torch.Tensor) -> bool:
    if value is base:
        return True
    is_alike = value.shape == base.shape and value.dtype == base.dtype and value.device == base.device
    return is_alike and (value.is_meta or torch.equal(value, base))
