"""What does a training step of one DoRA layer cost beside LoRA where Transformer Engine computes the base?

The MLP of `bench_layer.py`, of Megatron's layers over Transformer Engine: fc1 normalises its input. LoRA calls these
layers and takes the normalised input from them, as Megatron-Bridge's does; the adapters of dora_fx are in the graph
with the norm and the products. On CUDA Transformer Engine is the installed one. Without, its Python runs with kernels
that are emulated in plain torch, and the ratios show the shape of the cost alone:

    pip install --no-deps --target te -r .ci/emulated_te.txt
    python -m benchmarks.bench_te_layer --transformer-engine te
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

REFERENCE = "LoRA, eager"


class TELoRALinear(nn.Module):
    """LoRA on a layer that may normalise its input, which then hands the normalised input out."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.to_wrap, self.scaling = site.to_wrap, site.scaling
        self.lora_a, self.lora_b = site.adapter.linear_in.weight, site.adapter.linear_out.weight
        self.normalises = hasattr(self.to_wrap, "layer_norm_weight")
        if self.normalises:
            self.to_wrap.return_layernorm_output = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = self.to_wrap(x)
        if self.normalises:
            output, x = output
        return output + F.linear(F.linear(x, self.lora_a) * self.scaling, self.lora_b), bias


def measure(options: argparse.Namespace, device: str) -> Any:
    from bench_layer import DTYPES, TARGETS, make_step
    from measuring import CONTROL, compare
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear
    from variants import gated_mlp, with_dora

    from dora_fx import DoRALinear

    dtype = DTYPES[options.dtype]

    def mlp(dim: int = 0) -> nn.Module:
        linears = (TELayerNormColumnParallelLinear, TERowParallelLinear)
        model: nn.Module = gated_mlp(options.hidden, options.ffn, dtype, device, linears)
        return with_dora(model, dim, TARGETS) if dim else model

    def with_lora() -> nn.Module:
        model = mlp(options.dim)
        for name, site in list(model.named_children()):
            if isinstance(site, DoRALinear):
                setattr(model, name, TELoRALinear(site))
        return model

    variants: dict[str, tuple[nn.Module, str | None]] = {
        "base, eager": (mlp(), None),
        REFERENCE: (with_lora(), None),
        CONTROL: (with_lora(), None),
        "LoRA under Inductor": (with_lora(), "inductor"),
        "dora_fx, eager": (mlp(options.dim), None),
        "dora_fx": (mlp(options.dim), "dora_fx"),
    }
    x = torch.randn(options.tokens, 1, options.hidden, dtype=dtype, device=device, requires_grad=True)
    steps = {}
    for name, (model, backend) in variants.items():
        call = model if backend is None else torch.compile(model, backend=backend)
        steps[name] = make_step(call, model, x, options.micro_batches)
        steps[name]()
    return compare(steps, REFERENCE, device, rounds=options.rounds, max_rounds=options.max_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 1024, "ffn": 2816, "dim": 16, "tokens": 1024, "micro-batches": 8, "rounds": 7, "max-rounds": 28}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--transformer-engine", type=Path, help="folder with its Python, whose kernels are emulated")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    if options.transformer_engine is not None:
        sys.path.insert(0, str(options.transformer_engine))
        import tests.emulated_te.installed  # noqa: F401  before Megatron
    from measuring import save, show
    from quiet_world import quiet_world

    device = "cuda" if torch.cuda.is_available() and options.transformer_engine is None else "cpu"
    with quiet_world(device):
        found = measure(options, device)
    show(found, REFERENCE)
    if options.json:
        arguments = {k: v for k, v in vars(options).items() if k not in ("json", "transformer_engine")}
        save(options.json, {"te_layer": found}, kernels="emulated" if device == "cpu" else "real", **arguments)


if __name__ == "__main__":
    main()
