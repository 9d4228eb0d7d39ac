"""What does a DoRA layer cost beside the frozen base and LoRA, eager and compiled?

A gated MLP of Megatron's column and row layers, forward and backward. All variants run in turn within one round, and
each round gives ratios to compiled LoRA; medians and ranges of the ratios are printed and written as JSON.

    python benchmarks/bench_layer.py --hidden 1024 --ffn 2816 --dim 16 --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import nn

import dora_fx
from dora_fx.layers import DoRALinear
from dora_fx.megatron_world import megatron_world

REFERENCE = "LoRA compiled"


class LoRALinear(nn.Module):
    """The same A and B without a magnitude."""

    def __init__(self, site: DoRALinear) -> None:
        super().__init__()
        self.to_wrap, self.scaling = site.to_wrap, site.scaling
        self.lora_a, self.lora_b = site.adapter.linear_in.weight, site.adapter.linear_out.weight

    def forward(self, x: torch.Tensor) -> Any:
        output, bias = self.to_wrap(x)
        return output + F.linear(F.linear(x, self.lora_a) * self.scaling, self.lora_b), bias


def make_mlp(hidden: int, ffn: int) -> MLP:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=1,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    return MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))


def variants(hidden: int, ffn: int, dim: int) -> dict[str, Callable[..., Any]]:
    """Name -> callable. Every variant has parameters of its own."""

    def adapted() -> nn.Module:
        mlp = dora_fx.DoRA(["linear_fc1", "linear_fc2"], dim=dim, alpha=2 * dim, lora_B_init_method="normal")(
            make_mlp(hidden, ffn)
        )
        return mlp

    def lora() -> nn.Module:
        mlp = adapted()
        mlp.linear_fc1, mlp.linear_fc2 = LoRALinear(mlp.linear_fc1), LoRALinear(mlp.linear_fc2)
        return mlp

    return {
        "base compiled": torch.compile(make_mlp(hidden, ffn).requires_grad_(False)),
        REFERENCE: torch.compile(lora()),
        "DoRA eager": adapted(),
        "DoRA inductor": torch.compile(adapted(), backend="inductor"),
        "DoRA dora_fx": torch.compile(adapted(), backend="dora_fx"),
    }


def measure(functions: dict[str, Callable[..., Any]], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one forward and backward, per variant and round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(-1, rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function(x)[0].square().sum().backward()
            if x.is_cuda:
                torch.cuda.synchronize()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    table = {}
    for name, times in seconds.items():
        ratios = [mine / reference for mine, reference in zip(times, seconds[REFERENCE], strict=True)]
        table[name] = {
            "median_ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("ffn", 2816), ("dim", 16), ("tokens", 1024), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    with megatron_world():
        functions = variants(options.hidden, options.ffn, options.dim)
        x = torch.randn(options.tokens, 1, options.hidden, requires_grad=True)
        table = summarise(measure(functions, x, options.rounds))
    print(f"{'':16} {'median ms':>10} {'/ ' + REFERENCE:>16} {'range':>14}")
    for name, row in table.items():
        span = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
        print(f"{name:16} {row['median_ms']:10.2f} {row['ratio']:16.3f} {span:>14}")
    if options.json:
        about = {"date": str(date.today()), "torch": torch.__version__, "machine": platform.machine()}
        sizes = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({**about, **sizes, "variants": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
