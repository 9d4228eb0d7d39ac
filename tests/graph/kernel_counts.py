"""How many kernels Inductor makes of a layer, from the code that it generates for the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code


@dataclass(frozen=True)
class KernelCounts:
    """Of one direction: matrix products, fused kernels, and which of the latter reduce."""

    products: int
    fused: int
    reductions: int

    def __str__(self) -> str:
        return f"{self.products} products, {self.fused} fused kernels, {self.reductions} with a reduction"


def kernel_counts(model: nn.Module, x: torch.Tensor, **settings: object) -> tuple[KernelCounts, KernelCounts]:
    """Compile forward and backward of a layer on `x`, and count the kernels of each."""
    compiled: Callable = torch.compile(model, fullgraph=True, **settings)

    def run() -> None:
        output = compiled(x)
        (output[0] if isinstance(output, tuple) else output).sum().backward()

    torch._dynamo.reset()
    with fresh_cache():
        _, (forward, backward) = run_and_get_code(run)
    return _count(forward), _count(backward)


def _count(code: str) -> KernelCounts:
    calls = code[code.index("def call(") :]
    return KernelCounts(
        products=len(re.findall(r"extern_kernels\.(?:add)?mm\(|mkl_linear\(|cpp_\w*gemm\w*\(", calls)),
        fused=len(re.findall(r"^\s+cpp_fused\w*\(", calls, re.MULTILINE)),
        reductions=len(re.findall(r"^\s+cpp_fused\w*_sum_\w*\(", calls, re.MULTILINE)),
    )
