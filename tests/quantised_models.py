"""Small layers and models whose weights are quantised by bitsandbytes and torchao."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)

from tests.hf_models import tiny_hf_model

# bitsandbytes' kernel for a CPU is wrong where the input features are no multiple of the 64 elements of a block.
IN, OUT = 64, 128


def four_bit(quant_type: str, *, nested: bool, **settings: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        weight, bias = plain.weight.detach(), plain.bias
        options = dict(compress_statistics=nested, quant_type=quant_type) | settings
        layer = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, bias is not None, compute_dtype=weight.dtype, **options
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
        layer.bias = bias
        return layer.to("cpu")

    return make


def eight_bit(plain: nn.Linear) -> nn.Module:
    bias = plain.bias is not None
    layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(plain.weight.detach().half(), requires_grad=False, has_fp16_weights=False)
    layer.bias = plain.bias
    return layer.to("cpu")


def torchao(config: Callable[[], Any]) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        holder = nn.Sequential(plain)
        quantize_(holder, config())
        return holder[0]

    return make


def hqq(nbits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        config = BaseQuantizeConfig(nbits=nbits, group_size=32)
        return HQQLinear(plain, config, compute_dtype=plain.weight.dtype, device="cpu")

    return make


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4 double": four_bit("nf4", nested=True),
    "nf4": four_bit("nf4", nested=False),
    "fp4": four_bit("fp4", nested=False),
    "fp4 double in bfloat16": four_bit("fp4", nested=True, quant_storage=torch.bfloat16),
    "int8": eight_bit,
    "hqq 4": hqq(4),
    "hqq 2": hqq(2),
    "hqq 8": hqq(8),
    "torchao int8": torchao(Int8WeightOnlyConfig),
    "torchao int8 of one scale": torchao(lambda: Int8WeightOnlyConfig(granularity=PerTensor())),
    "torchao intx int8": torchao(lambda: IntxWeightOnlyConfig(weight_dtype=torch.int8)),
    "torchao intx int4": torchao(lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "torchao float8": torchao(Float8WeightOnlyConfig),
}


class TwoLayers(nn.Module):
    """Two quantised layers `up` `[OUT, IN]` and `down` `[IN, OUT]`, with biases."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"up": (IN, OUT), "down": (OUT, IN)}
        for name, (in_features, out_features) in sizes.items():
            plain = nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)
            setattr(self, name, KINDS[kind](plain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sin(self.up(x)))


def saved_llama(folder: Path) -> Path:
    """A folder with a tiny Llama of random weights, not quantised."""
    tiny_hf_model(hidden_size=IN, intermediate_size=OUT, num_attention_heads=4).save_pretrained(folder)
    return folder


def nf4_llama(folder: Path, **settings: Any) -> Any:
    """The Llama of `saved_llama`, as transformers loads it in NF4."""
    options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options |= dict(bnb_4bit_compute_dtype=torch.float32) | settings
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
