"""What does a training step of DoRA on the experts of one layer cost beside LoRA on the same experts?

Of grouped experts (TEGroupedMLP) and of sequential ones (SequentialMLP), each beside LoRA on the same form, with a
control. Both adapt the same base layers; LoRA's products of all experts are those of dora_fx. Also what an up-to-date
cache costs per call, and what a forward pass keeps.

On CUDA Transformer Engine is the installed one. Without, its Python runs with kernels that are emulated in plain torch:

    pip install --no-deps --target te -r .ci/emulated_te.txt
    python -m benchmarks.bench_experts --transformer-engine te [--quick]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from quick_option import parse_with_quick

REFERENCE = "LoRA, eager"
FORMS = ("grouped", "sequential")
TARGETS = ["linear_fc1", "linear_fc2"]
# What `--quick` puts in place of the other options.
QUICK = {"hidden": 32, "ffn": 48, "experts": 4, "tokens": 64, "micro_batches": 2, "rounds": 3, "max_rounds": 3}


class LoRA(nn.Module):
    """LoRA over a layer of one expert, or of several, with the factors of an adapter of dora_fx."""

    def __init__(self, site: Any, compiles: bool) -> None:
        super().__init__()
        self.to_wrap, self.scaling = site.to_wrap, site.scaling
        self.lora_a, self.lora_b = site.adapter.linear_in.weight, site.adapter.linear_out.weight
        self.add = torch.compile(_with_low_rank) if compiles else _with_low_rank

    def forward(self, x: torch.Tensor, counts: list[int] | None = None) -> tuple[torch.Tensor, Any]:
        output, bias = self.to_wrap(x) if counts is None else self.to_wrap(x, counts)
        ends = None if counts is None else torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        return self.add(x, output, self.lora_a, self.lora_b, self.scaling, ends), bias


def _with_low_rank(
    x: torch.Tensor, output: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, ends: torch.Tensor | None
) -> torch.Tensor:
    from dora_fx.function import grouped_product

    if ends is None:
        return output + F.linear(F.linear(x, a) * scaling, b)
    return output + grouped_product(grouped_product(x, a, ends) * scaling, b, ends)


class Experts(nn.Module):
    """The experts of a layer, called with tokens that are routed alike in all calls, some experts with few or none."""

    def __init__(self, experts: nn.Module, counts: torch.Tensor) -> None:
        super().__init__()
        self.experts, self.counts = experts, counts

    def forward(self, x: torch.Tensor) -> Any:
        return self.experts(x, self.counts, torch.ones(x.shape[0], dtype=x.dtype, device=x.device))


def build(options: argparse.Namespace, device: str, form: str, adapter: str) -> Experts:
    """Experts without an adapter, with DoRA or with LoRA; `adapter` ends in "compiled" where it is to be compiled."""
    from bench_layer import DTYPES

    import dora_fx
    from dora_fx import DoRALinear
    from dora_fx.modules import compile_grouped_linears
    from tests.distributed.moe_layers import ExpertLayout, build_moe_layer, moe_config

    sizes = {"hidden_size": options.hidden, "moe_ffn_hidden_size": options.ffn, "num_moe_experts": options.experts}
    dtype, is_grouped = DTYPES[options.dtype], form == "grouped"
    settings = sizes | {"moe_grouped_gemm": is_grouped, "moe_shared_expert_intermediate_size": None}
    layer = build_moe_layer(moe_config(ExpertLayout(), dtype, **settings), "te" if is_grouped else "local")
    counts = torch.arange(options.experts).float()
    counts = (counts / counts.sum() * options.tokens).long()
    counts[-1] += options.tokens - counts.sum()
    torch.manual_seed(0)
    model = Experts(layer.experts, counts).to(device).requires_grad_(False)
    if adapter == "none":
        return model
    dora_fx.DoRA(TARGETS, dim=options.dim, alpha=2 * options.dim)(model)
    compiles = adapter.endswith("compiled")
    if adapter.startswith("LoRA"):
        for holder in list(model.modules()):
            for name, site in list(holder.named_children()):
                if isinstance(site, DoRALinear):
                    setattr(holder, name, LoRA(site, compiles and is_grouped))
    elif compiles:
        compile_grouped_linears(model.modules(), {"backend": "dora_fx"})
    if compiles and not is_grouped:
        for expert in layer.experts.local_experts:
            expert.compile(backend="inductor" if adapter.startswith("LoRA") else "dora_fx")
    return model


def measure(options: argparse.Namespace, device: str, form: str) -> Any:
    from bench_layer import DTYPES, make_step
    from measuring import CONTROL, compare, saved_bytes

    adapters = {
        "base": "none",
        REFERENCE: "LoRA",
        CONTROL: "LoRA",
        "LoRA, compiled": "LoRA compiled",
        "dora_fx, eager": "DoRA",
        "dora_fx, compiled": "DoRA compiled",
    }
    x = torch.randn(options.tokens, options.hidden, dtype=DTYPES[options.dtype], device=device, requires_grad=True)
    models = {name: build(options, device, form, adapter) for name, adapter in adapters.items()}
    steps = {name: make_step(model, model, x, options.micro_batches) for name, model in models.items()}
    for step in steps.values():
        step()
    found = compare(steps, REFERENCE, device, rounds=options.rounds, max_rounds=options.max_rounds)
    for name, model in models.items():
        found.table[name]["saved MiB"] = saved_bytes(lambda model=model: model(x), model) / 2**20
        found.table[name]["look us"] = look_microseconds(model)
    return found


def look_microseconds(model: nn.Module) -> float | None:
    """What all adapted layers take per call to find that their norms are up to date; None of a model without any."""
    from dora_fx import DoRALinear
    from dora_fx.cache import refresh

    sites = [module.cached_site() for module in model.modules() if isinstance(module, DoRALinear)]
    if not sites:
        return None
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        for site in sites:
            refresh([site])
        times.append(time.perf_counter() - begin)
    return 1e6 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 512, "ffn": 768, "experts": 16, "dim": 8, "tokens": 4096, "micro-batches": 2}
    for name, default in {**sizes, "rounds": 7, "max-rounds": 28}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="by default both")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--transformer-engine", type=Path, help="folder with its Python, whose kernels are emulated")
    parser.add_argument("--json", type=Path, help="write the tables here")
    options = parse_with_quick(parser, QUICK)
    if options.transformer_engine is not None:
        sys.path.insert(0, str(options.transformer_engine))
        import tests.emulated_te.installed  # noqa: F401  before Megatron
    from measuring import save, show
    from quiet_world import quiet_world

    device = "cuda" if torch.cuda.is_available() and options.transformer_engine is None else "cpu"
    found = {}
    with quiet_world(device):
        for form in options.forms:
            found[form] = measure(options, device, form)
            print(f"{form} experts")
            show(found[form], REFERENCE)
    if options.json:
        arguments = {k: v for k, v in vars(options).items() if k not in ("json", "quick", "transformer_engine")}
        save(options.json, found, kernels="emulated" if device == "cpu" else "real", **arguments)


if __name__ == "__main__":
    main()
