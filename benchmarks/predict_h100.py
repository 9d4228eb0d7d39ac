"""What would a training step of DoRA cost beside LoRA on an H100, by the bytes and FLOPs of the code generated for it?

A Qwen3-8B-shaped transformer layer, with its attention and its norms, is compiled for sm_90; nothing runs, and no GPU
is needed. Every kernel takes the longer of its bytes over the memory's bandwidth and its FLOPs over the peak of
bfloat16 products, both as NVIDIA states them for the SXM card. Caches, launches and overlap are left out. The norms of
a step read the weights once, and are shared by its micro-batches.

    python benchmarks/predict_h100.py
    python benchmarks/predict_h100.py --kernels
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Table, save_tables
from torch import fx, nn
from torch._inductor import config as inductor_config
from variants import WholeLayer, with_dora, with_lora

from dora_fx.megatron.world import megatron_world
from dora_fx.passes import default_passes
from dora_fx.passes.pipeline import GraphPass, run_passes

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.graph.triton_source import Generated, generate_for_h100, kernel_kinds

BYTES_PER_S, FLOP_PER_S = 3.35e12, 989e12
HIDDEN, FFN, HEADS, GROUPS = 4096, 12288, 32, 8
QKV = HIDDEN * (HEADS + 2 * GROUPS) // HEADS
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
PRODUCT, ATTENTION, FUSED, NORMS = "matrix products", "attention", "fused kernels", "norms"
# Products of attention forward, and backward with those of its forward pass once more.
ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 2.0,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5.0,
}


@dataclass(frozen=True)
class Kernel:
    """One call of a kernel, or a library's.

    Attributes:
        kind: one of the four above.
        name: of generated code; the shapes of a product.
        bytes, flop: of this call.
    """

    kind: str
    name: str
    bytes: float
    flop: float = 0.0

    @property
    def seconds(self) -> float:
        """The longer of what its bytes and its FLOPs take."""
        return max(self.bytes / BYTES_PER_S, self.flop / FLOP_PER_S)


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


def library_calls(graph: fx.GraphModule) -> Iterator[Kernel]:
    """The matrix products and the attention of an ATen graph, which libraries run."""
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            first, second = (operand.meta["val"] for operand in node.args[-2:])
            flop = 2.0 * first.shape[0] * first.shape[1] * second.shape[1]
            name = f"{list(first.shape)} x {list(second.shape)}"
            yield Kernel(PRODUCT, name, _bytes_of(first, second, node.meta["val"]), flop)
        elif node.target in ATTENTION_OPS:
            operands = [operand.meta["val"] for operand in node.all_input_nodes]
            queries = next(value for value in operands if value.dim() == 4)
            # Each product multiplies every query with the half of the keys that are before it.
            flop = ATTENTION_OPS[node.target] * queries.numel() * queries.shape[2]
            yield Kernel(ATTENTION, node.name, _bytes_of(*operands, *node.meta["val"]), flop)


def _bytes_of(*values: Any) -> float:
    return float(sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)))


def kernels_of(generated: Generated) -> Iterator[Kernel]:
    """What one direction runs; Inductor states the bytes of its kernels, without what is read twice."""
    yield from library_calls(generated.graph)
    gigabytes = [float(found) for found in re.findall(r"'kernel_num_gb': ([0-9.e+-]+)", generated.source)]
    names = re.findall(r"async_compile\.triton\('(\w+)'", generated.source)
    calls = re.findall(r"^\s+(triton_\w+)\.run\(", generated.source, re.MULTILINE)
    assert len(gigabytes) == len(names) and len(calls) == len(kernel_kinds(generated.source))
    sizes = dict(zip(names, gigabytes, strict=True))
    yield from (Kernel(FUSED, name, 1e9 * sizes[name]) for name in calls)


def training_pass(model: nn.Module, tokens: int, passes: Sequence[GraphPass]) -> list[Kernel]:
    """The kernels of a forward and a backward pass."""
    x = torch.empty(tokens, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    found = capture(model, x, passes)
    inputs = [value.detach().requires_grad_(value.requires_grad) for value in found.inputs]
    with inductor_config.patch(profile_bandwidth=True):
        generated = generate_for_h100(lambda *args: found.gm(*args)[0], inputs)
    return [kernel for each in generated for kernel in kernels_of(each)]


def norm_refresh(dim: int, micro_batches: int) -> list[Kernel]:
    """A micro-batch's share of a step's norms: A W0^T reads every weight, the rest is of the factors' size."""
    shapes = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)]
    return [
        Kernel(
            NORMS,
            f"{[rows, columns]} x {[columns, dim]}",
            2.0 * rows * columns / micro_batches,
            2.0 * rows * columns * dim / micro_batches,
        )
        for rows, columns in shapes
    ]


def measure(options: argparse.Namespace) -> dict[str, list[Kernel]]:
    """The kernels of each variant's micro-batch."""
    found: dict[str, list[Kernel]] = {}
    variants = {"base": (None, []), "LoRA": (with_lora, []), "dora_fx": (with_dora, default_passes())}
    for name, (attach, passes) in variants.items():
        model: nn.Module = WholeLayer(HIDDEN, FFN, HEADS, GROUPS, options.tokens, torch.bfloat16, "cpu")
        model = model if attach is None else attach(model, options.dim, TARGETS)
        found[name] = training_pass(model, options.tokens, passes)
        torch._dynamo.reset()
    norms = norm_refresh(options.dim, options.micro_batches)
    return found | {"dora_fx, with its share of a step's norms": [*found["dora_fx"], *norms]}


def table_of(found: Mapping[str, Sequence[Kernel]]) -> Table:
    """Sums by variant, and by kind within each; the ratio of times to LoRA's."""
    reference = sum(kernel.seconds for kernel in found["LoRA"])
    groups = {}
    for name, kernels in found.items():
        kinds = dict.fromkeys(kernel.kind for kernel in kernels)
        groups[name] = kernels
        groups |= {f"{name}: {kind}": [each for each in kernels if each.kind == kind] for kind in kinds}
    return {
        name: {
            "kernels": len(kernels),
            "GB": sum(kernel.bytes for kernel in kernels) / 1e9,
            "TFLOP": sum(kernel.flop for kernel in kernels) / 1e12,
            "predicted ms": 1e3 * sum(kernel.seconds for kernel in kernels),
            "ratio": sum(kernel.seconds for kernel in kernels) / reference,
        }
        for name, kernels in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "dim": 16, "micro-batches": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--kernels", action="store_true", help="show every kernel, the longest first")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    with megatron_world("cpu"):
        found = measure(options)
    table = table_of(found)
    print(f"{'':58}", *(f"{column:>14}" for column in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:58}", *(f"{value:14.4f}" for value in row.values()))
    for name, kernels in found.items() if options.kernels else ():
        print(f"\n{name}\n{'us':>9} {'GB':>8} {'TFLOP':>8}")
        for kernel in sorted(kernels, key=lambda kernel: -kernel.seconds):
            numbers = f"{1e6 * kernel.seconds:9.2f} {kernel.bytes / 1e9:8.4f} {kernel.flop / 1e12:8.4f}"
            print(f"{numbers} {kernel.kind}: {kernel.name}")
    if options.json:
        sizes = {name: value for name, value in vars(options).items() if name not in ("json", "kernels")}
        save_tables(options.json, {"predicted for an H100": table}, **sizes)


if __name__ == "__main__":
    main()
