"""Attributes and state-dict keys by which code that knows no adapters takes an adapted layer for its base layer.

transformers ties and resizes embeddings, Megatron switches an output layer's sequence parallelism off for one call:
an adapted layer answers with its base layer's attributes and hands new values on to it. A value that would change the
adapted function, or part the adapter from its layer, is refused. A base checkpoint loads into an adapted model, and an
adapted model's state dict holds the base's entries under the keys that they have without adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dora_fx.function import BaseWeight, QuantisedWeight
from dora_fx.modules.kinds import LinearKind


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
    """A module that stands in for the layer `to_wrap`, with its attributes and its state-dict keys.

    Args:
        to_wrap: a layer of one of `kinds.KINDS`.
        kind: which of them.
        path: of the module, for error messages.
        base_weight: the weight of a layer that has none of its own.
    """

    to_wrap: Any

    def __init__(self, to_wrap: nn.Module, path: str, kind: type[LinearKind], base_weight: nn.Parameter | None) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        self.path, self.kind = path, kind
        # The embedding owns this parameter. nn.Module registers a parameter that is set as an attribute, but not one
        # inside a tuple; registered here too, it would be in the state dict and in the optimizer twice.
        self._borrowed_weight = (base_weight,)
        self._register_load_state_dict_pre_hook(self._add_wrapper_to_keys)
        self.register_load_state_dict_post_hook(_take_wrapper_from_keys)

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
        """Raise ValueError: Megatron reads the base layer's `ub_name` to build another layer in its place."""
        self.to_wrap.ub_name  # noqa: B018
        raise ValueError(
            f"{self.path}: found an adapted layer where another one is built of its weights, as Megatron splits one "
            "into norm and product, expected a plain layer: the copy would have no adapter. Merge it first"
        )

    @property
    def base_weight(self) -> BaseWeight:
        """Return W0, or this rank's shard of it; the borrowed one where the layer has none of its own."""
        own = self.kind.stored_weight(self.to_wrap)
        weight = own if own is not None else self._borrowed_weight[0]
        if weight is None:
            raise ValueError(f"{self.path}: the layer has no weight of its own and none was passed")
        return weight

    @property
    def weight(self) -> nn.Parameter | None:
        """Return the base layer's own weight, None where the layer borrows one.

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
        """Return the base layer's bias, None without one. It is added unscaled, so any may be set."""
        return self.to_wrap.bias

    @bias.setter
    def bias(self, value: nn.Parameter | None) -> None:
        self.to_wrap.bias = value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, in the base layer if it is one of a linear layer's.

        `layer.weight = parameter` comes here before it comes to the property.
        """
        if name in ("weight", "bias", "layer_norm_weight", "layer_norm_bias"):
            getattr(BaseAttributes, name).fset(self, param)
        else:
            super().register_parameter(name, param)

    def backward_dw(self) -> None:
        """Compute delayed weight gradients of the base layer. Megatron calls it though a frozen layer has none."""
        if self.base_weight.requires_grad:
            self.to_wrap.backward_dw()

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the base layer's entries under the keys it has without an adapter, and the adapter's."""
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        wrapped = f"{prefix}to_wrap."
        for key in [key for key in destination if key.startswith(wrapped)]:
            destination[prefix + key.removeprefix(wrapped)] = destination.pop(key)
        return destination

    def _add_wrapper_to_keys(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rename the base layer's entries to where `load_state_dict` looks for them; a load pre-hook."""
        children = (f"{prefix}adapter.", f"{prefix}to_wrap.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(children)]:
            state_dict[f"{prefix}to_wrap.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _take_wrapper_from_keys(module: nn.Module, incompatible_keys: Any) -> None:
    """Report missing and unexpected keys by the names that users know; a load post-hook."""
    for keys in incompatible_keys:
        keys[:] = [key.replace(".to_wrap.", ".").removeprefix("to_wrap.") for key in keys]


def _is_same(value: torch.Tensor, base: BaseWeight) -> bool:
    if isinstance(base, QuantisedWeight):
        # What a quantised weight stands for is not in its first tensor alone.
        return value is base.tensors[0]
    if value is base:
        return True
    is_alike = value.shape == base.shape and value.dtype == base.dtype and value.device == base.device
    return is_alike and (value.is_meta or torch.equal(value, base))
