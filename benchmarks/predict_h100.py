"""What would a training step of DoRA cost beside LoRA on an H100, by the bytes and FLOPs of the code generated for it?

The linear layers of a Qwen3-8B-shaped transformer layer and its SwiGLU are compiled for sm_90; nothing runs, and no
GPU is needed. Every kernel takes the longer of its bytes over the memory's bandwidth and its FLOPs over the peak of
bfloat16 products, both as NVIDIA states them for the SXM card. Caches, launches and overlap are left out. The norms of
a step read the weights once, and are shared by its micro-batches.

    python benchmarks/predict_h100.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Table, save_tables
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import fx, nn
from torch._inductor import config as inductor_config
from variants import gated_mlp, with_dora, with_lora

from dora_fx.megatron.world import megatron_world
from dora_fx.passes import default_passes
from dora_fx.passes.pipeline import GraphPass, run_passes

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.graph.triton_source import Generated, generate_for_h100, kernel_kinds

BYTES_PER_S, FLOP_PER_S = 3.35e12, 989e12
HIDDEN, FFN, QKV = 4096, 12288, 6144


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass."""

    kernels: int = 0
    bytes: float = 0.0
    flop: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.kernels + other.kernels,
            self.bytes + other.bytes,
            self.flop + other.flop,
            self.seconds + other.seconds,
        )


def kernel(num_bytes: float, flop: float = 0.0) -> Cost:
    return Cost(1, num_bytes, flop, max(num_bytes / BYTES_PER_S, flop / FLOP_PER_S))


class Captured(Exception):
    """Dynamo's graph and its inputs, in place of a result."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.gm, self.inputs = gm, inputs


def capture(model: nn.Module, x: torch.Tensor, passes: Sequence[GraphPass]) -> Captured:
    """What a backend hands to Inductor; nothing is run."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = run_passes(gm, example_inputs, passes)

        def stop(*inputs: Any) -> Any:
            raise Captured(gm, inputs)

        return stop

    try:
        torch.compile(model, backend=backend, fullgraph=True)(x)
    except Captured as captured:
        return captured
    raise AssertionError("the compiled model was not called")


def products(graph: fx.GraphModule) -> Cost:
    """The matrix products of an ATen graph, which libraries run."""
    total = Cost()
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            first, second = (operand.meta["val"] for operand in node.args[-2:])
            tensors = (first, second, node.meta["val"])
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            total += kernel(num_bytes, 2.0 * first.shape[0] * first.shape[1] * second.shape[1])
    return total


def cost(generated: Generated) -> Cost:
    """Products and generated kernels; Inductor states the bytes of those, without what is read twice."""
    total = products(generated.graph)
    gigabytes = [float(found) for found in re.findall(r"'kernel_num_gb': ([0-9.e+-]+)", generated.source)]
    assert len(gigabytes) == len(set(re.findall(r"async_compile\.triton\('(\w+)'", generated.source)))
    calls = re.findall(r"^\s+(triton_\w+)\.run\(", generated.source, re.MULTILINE)
    assert len(calls) == len(kernel_kinds(generated.source))
    sizes = dict(zip(re.findall(r"async_compile\.triton\('(\w+)'", generated.source), gigabytes, strict=True))
    for name in calls:
        total += kernel(1e9 * sizes[name])
    return total


def training_pass(model: nn.Module, tokens: int, passes: Sequence[GraphPass]) -> Cost:
    x = torch.empty(tokens, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    found = capture(model, x, passes)
    inputs = [value.detach().requires_grad_(value.requires_grad) for value in found.inputs]
    with inductor_config.patch(profile_bandwidth=True):
        return sum(map(cost, generate_for_h100(lambda *args: found.gm(*args)[0], inputs)), Cost())


def norm_refresh(dim: int) -> Cost:
    """Norms of one step: A W0^T reads every weight, the rest is of the factors' size."""
    shapes = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)]
    each = [kernel(2.0 * rows * columns, 2.0 * rows * columns * dim) for rows, columns in shapes]
    return sum(each, Cost())


class AttentionLinears(nn.Module):
    """The linear layers around an attention, in whose place the queries are passed on."""

    def __init__(self) -> None:
        super().__init__()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            use_cpu_initialization=True,
            params_dtype=torch.bfloat16,
        )
        settings: dict[str, Any] = {"config": config, "init_method": nn.init.zeros_, "bias": False}
        self.linear_qkv = ColumnParallelLinear(HIDDEN, QKV, **settings)
        self.linear_proj = RowParallelLinear(HIDDEN, HIDDEN, **settings, input_is_parallel=True, skip_bias_add=True)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, _ = self.linear_qkv(x)[0].split([HIDDEN, QKV - HIDDEN], -1)
        return self.linear_proj(queries.contiguous())


def measure(options: argparse.Namespace) -> Table:
    parts: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
        "attention's linear layers": (AttentionLinears, ["linear_qkv", "linear_proj"]),
        "gated MLP": (
            lambda: gated_mlp(HIDDEN, FFN, torch.bfloat16, "cpu"),
            ["linear_fc1", "linear_fc2"],
        ),
    }
    totals = {"LoRA": Cost(), "dora_fx": Cost()}
    for name, (build, targets) in parts.items():
        for variant, attach, passes in (("LoRA", with_lora, []), ("dora_fx", with_dora, default_passes())):
            found = training_pass(attach(build(), options.dim, targets), options.tokens, passes)
            print(
                f"{name}, {variant}: {found.kernels} kernels, {found.bytes / 1e9:.2f} GB, {found.flop / 1e12:.2f} TFLOP"
            )
            totals[variant] += found
            torch._dynamo.reset()
    refresh = norm_refresh(options.dim)
    share = Cost(0, *(value / options.micro_batches for value in (refresh.bytes, refresh.flop, refresh.seconds)))
    totals["dora_fx, its share of the norms"] = totals["dora_fx"] + share
    reference = totals["LoRA"]
    return {
        name: {
            "kernels": found.kernels,
            "GB": found.bytes / 1e9,
            "TFLOP": found.flop / 1e12,
            "predicted ms": 1e3 * found.seconds,
            "ratio": found.seconds / reference.seconds,
        }
        for name, found in totals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "dim": 16, "micro-batches": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    with megatron_world("cpu"):
        table = measure(options)
    print(f"{'':32}", *(f"{column:>14}" for column in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:32}", *(f"{value:14.4f}" for value in row.values()))
    if options.json:
        sizes = {name: value for name, value in vars(options).items() if name != "json"}
        save_tables(options.json, {"predicted for an H100": table}, **sizes)


if __name__ == "__main__":
    main()
