"""Maps names of a Megatron model's modules and parameters to those of the equivalent GPTModel of the local spec.

    GPTModel, TE spec
    decoder.layers.1.self_attention.linear_qkv.layer_norm_weight    decoder.layers.1.input_layernorm.weight
    decoder.layers.1.mlp.linear_fc1.layer_norm_weight               decoder.layers.1.pre_mlp_layernorm.weight

    HybridModel of the pattern "*-*-"
    decoder.layers.2.self_attention.linear_proj                     decoder.layers.1.self_attention.linear_proj
    decoder.layers.3.mlp.linear_fc2                                 decoder.layers.1.mlp.linear_fc2
    decoder.final_norm                                              decoder.final_layernorm

The exchange with Hugging Face (checkpoints, adapters, streams) uses the names on the right for every spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_fx.megatron import ATTENTION, MLP, hybrid_pattern_maybe, is_attention_and_mlp, path_of_expert, walk
from dora_fx.models.hf_architectures import LINEAR_FC1, LINEAR_QKV
from dora_fx.modules import LinearSpec, describe_linear, is_grouped_linear

FINAL_NORM, INPUT_NORM, PRE_MLP_NORM = "decoder.final_layernorm", "input_layernorm", "pre_mlp_layernorm"
# Linear layers that may normalise their input themselves -> the norm before them in specs where they do not.
FUSED_NORMS = {LINEAR_QKV: INPUT_NORM, LINEAR_FC1: PRE_MLP_NORM}
_FUSED = "layer_norm_"
_HYBRID_FINAL_NORM = "decoder.final_norm"
_LAYER_PATH = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class DecoderNames:
    """Naming scheme of a model's decoder layers.

    Attributes:
        pattern: a HybridModel's layers, one symbol each, without the boundaries of pipeline stages; None for a
            GPTModel, whose layers have an attention and an MLP each.
        num_layers: of the equivalent GPTModel.
    """

    pattern: str | None
    num_layers: int

    @classmethod
    def of(cls, model: Any) -> DecoderNames:
        """Read the naming scheme from a model, or a chunk of one, without wrappers.

        Raises:
            ValueError: a HybridModel's layers do not alternate between attention and MLP, as a GPTModel's do.
        """
        pattern = hybrid_pattern_maybe(model)
        if pattern is None:
            return cls(None, model.config.num_layers)
        if not is_attention_and_mlp(pattern):
            raise ValueError(
                f"hybrid_layer_pattern: found {pattern!r}, expected attention and MLP in turn ({ATTENTION}{MLP}...), "
                "as in every supported architecture"
            )
        return cls(pattern, len(pattern) // 2)

    def gpt_path(self, path: str) -> str:
        """Map a module's path to its path in the GPTModel; layer numbers count in the whole model."""
        if self.pattern is None:
            return path
        if path == _HYBRID_FINAL_NORM:
            return FINAL_NORM
        match = _LAYER_PATH.fullmatch(path)
        return f"decoder.layers.{int(match[1]) // 2}.{match[2]}" if match else path

    def fused_name(self, name: str) -> str:
        """Map a GPTModel's parameter name to its name in this model, built of Transformer Engine's layers.

        Checkpoints of every spec use these names.
        """
        match = _LAYER_PATH.fullmatch(name)
        if match is None:
            return name
        index, within = int(match[1]), match[2]
        for linear, norm in FUSED_NORMS.items():
            if within.startswith(f"{norm}."):
                within = f"{linear}.{_FUSED}{within.removeprefix(f'{norm}.')}"
        if self.pattern is not None:
            # An attention and an MLP are two layers in a HybridModel.
            index = 2 * index + within.startswith("mlp.")
        return f"decoder.layers.{index}.{within}"

    def gpt_parameters(self, path: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield a module's own parameters with their names in the GPTModel, which has a layer for each expert."""
        gpt_path = self.gpt_path(path)
        if is_grouped_linear(module):
            yield from _parameters_of_experts(gpt_path, describe_linear(path, module))
            return
        match = _LAYER_PATH.fullmatch(gpt_path)
        norm = FUSED_NORMS.get(match[2]) if match else None
        for name, parameter in module.named_parameters(recurse=False):
            if match and norm and name.startswith(_FUSED):
                yield f"decoder.layers.{match[1]}.{norm}.{name.removeprefix(_FUSED)}", parameter
            else:
                yield f"{gpt_path}.{name}", parameter


def _parameters_of_experts(grouped_path: str, spec: LinearSpec) -> Iterator[tuple[str, nn.Parameter]]:
    assert spec.experts is not None
    for index in range(spec.experts.count):
        own = spec.of_matrix(index)
        assert own.experts is not None and own.experts.first is not None and isinstance(own.weight, nn.Parameter)
        path = path_of_expert(grouped_path, str(own.experts.first))
        yield f"{path}.weight", own.weight
        if own.bias is not None:
            yield f"{path}.bias", own.bias


def parameters_by_gpt_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of a model without adapters, by its name in the GPTModel."""
    names = DecoderNames.of(model)
    return dict(pair for named in walk(model) for pair in names.gpt_parameters(named.whole_path, named.module))
