"""What does a training step of one DoRA layer cost beside LoRA, the frozen base, and other implementations?

A gated MLP of Megatron's column and row layers: some micro-batches forward and backward, then AdamW. All variants run
in turn within one round, and each round gives ratios to compiled LoRA. LoRA built and compiled again is the control:
rounds go on until the interval of its ratio is within 1 %, or the table says that it did not get there.

    python benchmarks/bench_layer.py
    python benchmarks/bench_layer.py --hidden 2048 --ffn 5632 --dim 64 --tokens 64
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import CONTROL, Comparison, compare, peak_bytes, save, saved_bytes, show
from quiet_world import quiet_world
from torch import nn
from torch.utils.checkpoint import checkpoint
from variants import HAS_BRIDGE, PlainGatedMLP, gated_mlp, with_bridge_dora, with_dora, with_lora, with_peft

REFERENCE = "LoRA compiled"
TARGETS = ["linear_fc1", "linear_fc2"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A model, and the arguments of `torch.compile`, or None for eager.
Variant = tuple[nn.Module, dict[str, Any] | None]


def make_variants(options: argparse.Namespace, device: str) -> dict[str, Variant]:
    """Every variant by name, or those of `--only`."""
    sizes = (options.hidden, options.ffn, DTYPES[options.dtype], device)

    def mlp(attach: Callable[..., nn.Module]) -> nn.Module:
        return attach(gated_mlp(*sizes), options.dim, TARGETS)

    inductor: dict[str, Any] = {"backend": "inductor"}
    every_call = {"backend": "dora_fx", "options": {"weight_norm": "every_call"}}
    variants: dict[str, Variant] = {
        "base compiled": (gated_mlp(*sizes), inductor),
        REFERENCE: (mlp(with_lora), inductor),
        CONTROL: (mlp(with_lora), inductor),
        "dora_fx": (mlp(with_dora), {"backend": "dora_fx"}),
        "dora_fx, norm every call": (mlp(with_dora), every_call),
        "dora_fx eager": (mlp(with_dora), None),
        "dora_fx under Inductor": (mlp(with_dora), inductor),
        "LoRA eager": (mlp(with_lora), None),
        "PEFT DoRA eager": (with_peft(PlainGatedMLP(*sizes), options.dim, TARGETS), None),
    }
    if HAS_BRIDGE:
        variants["Megatron-Bridge eager"] = (mlp(with_bridge_dora), None)
        variants["Megatron-Bridge under Inductor"] = (mlp(with_bridge_dora), inductor)
    wanted = variants if options.only is None else {REFERENCE, CONTROL, *options.only}
    return {name: variant for name, variant in variants.items() if name in wanted}


def make_step(
    call: Callable[..., Any], model: nn.Module, x: torch.Tensor, micro_batches: int, *, keeps_gradients: bool = False
) -> Callable[[], None]:
    """One optimizer step. The input takes a gradient too, as in the middle of a model.

    With `keeps_gradients` they are added up in the same memory in all steps, as a CUDA graph needs, whose next replay
    overwrites what it has returned.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    for tensor in (*trained, x):
        tensor.grad = torch.zeros_like(tensor) if keeps_gradients else None

    def step() -> None:
        for _ in range(micro_batches):
            call(x)[0].float().square().sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=not keeps_gradients)
        x.grad = x.grad.zero_() if keeps_gradients and x.grad is not None else None

    return step


def measure(options: argparse.Namespace, device: str) -> Comparison:
    x = torch.randn(options.tokens, 1, options.hidden, dtype=DTYPES[options.dtype], device=device, requires_grad=True)
    variants = make_variants(options, device)
    return compare_steps({name: lambda v=v: v for name, v in variants.items()}, x, options, device)


def compare_steps(
    variants: Mapping[str, Callable[[], Variant]],
    x: torch.Tensor,
    options: argparse.Namespace,
    device: str,
    failed: dict[str, str] | None = None,
    **settings: bool,
) -> Comparison:
    """Compare training steps, with their memory, of variants that are made when it is their turn.

    Args:
        variants: `REFERENCE` and `CONTROL` are among them.
        options: of `main`: `micro_batches`, `rounds`, `max_rounds` and `recompute`.
        failed: where a variant that cannot be run is entered with the reason, and left out of the comparison; None
            lets it raise.
        settings: of `make_step`.
    """
    steps, memory = {}, {}
    for name, make in variants.items():
        try:
            step, memory[name] = _prepare(*make(), x, options, device, settings)
        except Exception as error:
            if failed is None or name in (REFERENCE, CONTROL):
                raise
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            steps[name] = step
    found = compare(steps, REFERENCE, device, rounds=options.rounds, max_rounds=options.max_rounds)
    return replace(found, table={name: row | memory[name] for name, row in found.table.items()})


def _prepare(
    model: nn.Module,
    compiled: dict[str, Any] | None,
    x: torch.Tensor,
    options: argparse.Namespace,
    device: str,
    settings: Mapping[str, bool],
) -> tuple[Callable[[], None], dict[str, float]]:
    """A training step of a model, which was taken once, and its memory."""
    call: Callable[..., Any] = model if compiled is None else torch.compile(model, **compiled)
    if options.recompute:
        call = functools.partial(checkpoint, call, use_reentrant=False)
    step = make_step(call, model, x, options.micro_batches, **settings)
    step()
    peak = peak_bytes(step, device)
    return step, {"saved MiB": saved_bytes(lambda: call(x)[0], model) / 2**20, "peak MiB": peak / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 1024, "ffn": 2816, "dim": 16, "tokens": 1024, "micro-batches": 8, "rounds": 7, "max-rounds": 28}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--recompute", action="store_true", help="checkpoint the layer")
    parser.add_argument("--only", nargs="+", help="names of variants to measure beside the reference and its control")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_world(device):
        found = measure(options, device)
    show(found, REFERENCE)
    if options.json:
        save(options.json, {"layer": found}, **{k: v for k, v in vars(options).items() if k != "json"})


if __name__ == "__main__":
    main()
