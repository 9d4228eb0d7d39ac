"""What do the row norms of W0 + s B A cost, in time and memory?

This library's factored norm in blocks, the dense norm, PEFT's (which makes B A by multiplying an identity matrix)
and the factored norm with everything in float32, on the same weights; errors are against float64. A call that is short
waits for its launches, so the time of its kernels alone, on a CPU of its operators, stands beside it.

    python benchmarks/bench_norm.py
    python benchmarks/bench_norm.py --dtype bf16 --shapes 4096x4096x384 8192x28672x384
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import CONTROL, Comparison, compare, kernel_times, peak_bytes, save, show
from variants import peft_norm

from dora_fx.function.weight_norm import norm_dtype, norm_of_terms, norm_terms

REFERENCE = "dora_fx"
SCALING = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def factored_in_blocks(
    weight: torch.Tensor, base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> torch.Tensor:
    dtype = norm_dtype(weight.dtype)
    scaling = torch.tensor([SCALING], dtype=dtype, device=weight.device)
    linear_terms, gram = norm_terms(base_norm_sq, weight, lora_a, lora_b, scaling=scaling, dtype=dtype)
    return norm_of_terms(linear_terms, gram, lora_b, scaling=scaling, dtype=dtype)


def factored_in_float32(
    weight: torch.Tensor, base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> torch.Tensor:
    weight, lora_a, lora_b = weight.float(), lora_a.float(), lora_b.float()
    cross = (F.linear(weight, lora_a) * lora_b).sum(1)
    own = (F.linear(lora_b, lora_a @ lora_a.t()) * lora_b).sum(1)
    return (base_norm_sq + 2 * SCALING * cross + SCALING**2 * own).clamp(min=0).sqrt()


def dense(weight: torch.Tensor, base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight + SCALING * lora_b @ lora_a, dim=1)


def peft(weight: torch.Tensor, base_norm_sq: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    return peft_norm(weight, lora_a, lora_b, SCALING)


NORMS: dict[str, Norm] = {
    REFERENCE: factored_in_blocks,
    "factored, all in float32": factored_in_float32,
    "dense": dense,
    "PEFT": peft,
}


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int) -> Comparison:
    out_features, in_features, dim = shape
    weight = torch.randn(out_features, in_features, dtype=dtype, device=device) * in_features**-0.5
    lora_a = torch.randn(dim, in_features, dtype=dtype, device=device) * in_features**-0.5
    lora_b = torch.randn(out_features, dim, dtype=dtype, device=device) * 0.1
    base_norm_sq = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    tensors = (weight, base_norm_sq, lora_a, lora_b)
    exact = dense(*(tensor.double() for tensor in tensors))
    calls = {name: lambda norm=norm: norm(*tensors) for name, norm in NORMS.items()}
    more = {}
    for name, call in calls.items():
        peak = peak_bytes(call, device)
        error = (call().double() - exact) / exact
        times = kernel_times(call, device).values()
        more[name] = {
            "temporary MiB": peak / 2**20,
            "error x 1e6": 1e6 * float(error.abs().max()),
            "kernels": float(sum(count for count, _ in times)),
            "kernels' us": 1e3 * sum(milliseconds for _, milliseconds in times),
        }
    calls[CONTROL] = calls[REFERENCE]
    found = compare(calls, REFERENCE, device, rounds=rounds, max_rounds=4 * rounds)
    return replace(found, table={name: row | more.get(name, {}) for name, row in found.table.items()})


def parse_shape(text: str) -> tuple[int, int, int]:
    out_features, in_features, dim = map(int, text.split("x"))
    return out_features, in_features, dim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["4096x4096x16", "4096x4096x384", "2048x8192x64"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="OUTxINxDIM ...; default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the tables here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = {}
    with torch.no_grad():
        for text in options.shapes:
            print(f"\n{text} {options.dtype}")
            tables[text] = measure(parse_shape(text), DTYPES[options.dtype], device, options.rounds)
            show(tables[text], REFERENCE)
    if options.json:
        save(options.json, tables, dtype=options.dtype)


if __name__ == "__main__":
    main()
