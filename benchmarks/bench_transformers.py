r"""What does a training step of a transformers model cost, beside PEFT's LoRA and DoRA?

Four layers of SmolLM2-135M's and of Qwen2-0.5B's shape with random weights, one batch forward and backward and a step
of AdamW. dora_fx is compiled by `compile_model`; PEFT's adapters are compiled as their users do it, layer by layer. All
variants of a shape run in turn within one round, and each round gives ratios to compiled LoRA.

    python benchmarks/bench_transformers.py --json benchmarks/results/transformers.json
    python benchmarks/bench_transformers.py --quick
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_model import DTYPES, HF_TARGETS, Variant
from measuring import CONTROL, Comparison, compare, peak_bytes, save, show
from torch import nn
from torch._inductor.utils import fresh_cache
from variants import with_dora, with_peft

import dora_fx

REFERENCE = "PEFT LoRA compiled"
SMOLLM2, QWEN2 = "SmolLM2-135M", "Qwen2-0.5B"
CONFIGS: dict[str, type[Any]] = {SMOLLM2: transformers.LlamaConfig, QWEN2: transformers.Qwen2Config}
SIZES = {
    SMOLLM2: {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    QWEN2: {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
# What `--quick` puts in place of the other options: everything runs once, and no number means anything.
QUICK = {"layers": 2, "tokens": 16, "vocab": 64, "dim": 4, "rounds": 1, "max_rounds": 1}


def base_model(shape: str, options: argparse.Namespace, device: str) -> Any:
    """A model of random weights, the same in every call."""
    config = CONFIGS[shape](
        **(TINY if options.quick else SIZES[shape]),
        num_hidden_layers=options.layers,
        vocab_size=options.vocab,
        max_position_embeddings=options.tokens,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(device=device, dtype=DTYPES[options.dtype])


def make_variants(shape: str, options: argparse.Namespace, device: str) -> dict[str, Variant]:
    tokens = torch.randint(0, options.vocab, (options.batch, options.tokens), device=device)

    def losses(model: nn.Module) -> torch.Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    def peft(*, use_dora: bool, compiles: bool) -> Variant:
        base = base_model(shape, options, device)
        model = with_peft(base, options.dim, HF_TARGETS, use_dora=use_dora)
        for layer in base.model.layers if compiles else ():
            layer.compile()
        return Variant(model, losses, 1)

    def ours(*, compiles: bool) -> Variant:
        model = with_dora(base_model(shape, options, device), options.dim, HF_TARGETS)
        return Variant(dora_fx.compile_model(model) if compiles else model, losses, 1)

    makers: dict[str, Callable[[], Variant]] = {
        REFERENCE: lambda: peft(use_dora=False, compiles=True),
        CONTROL: lambda: peft(use_dora=False, compiles=True),
        "PEFT LoRA eager": lambda: peft(use_dora=False, compiles=False),
        "dora_fx compiled": lambda: ours(compiles=True),
        "dora_fx eager": lambda: ours(compiles=False),
        "PEFT DoRA compiled": lambda: peft(use_dora=True, compiles=True),
        "PEFT DoRA eager": lambda: peft(use_dora=True, compiles=False),
    }
    return {name: make() for name, make in makers.items()}


def measure(shape: str, options: argparse.Namespace, device: str) -> Comparison:
    variants = make_variants(shape, options, device)
    steps = {name: variant.train_step for name, variant in variants.items()}
    extra = {}
    for name, step in steps.items():
        with fresh_cache():
            begin = time.perf_counter()
            step()
            extra[name] = {"first step s": time.perf_counter() - begin}
        extra[name]["peak MiB"] = peak_bytes(step, device) / 2**20
    found = compare(steps, REFERENCE, device, rounds=options.rounds, max_rounds=options.max_rounds)
    return replace(found, table={name: row | extra[name] for name, row in found.table.items()})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "tokens": 256, "batch": 1, "vocab": 1024, "dim": 16, "rounds": 9, "max-rounds": 90}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--shape", choices=CONFIGS, help="default both")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--quick", action="store_true", help="run everything once in tiny sizes, to see that it works")
    parser.add_argument("--json", type=Path, help="write the tables here")
    options = parser.parse_args()
    if options.quick and options.json:
        parser.error("--quick: found --json too, expected none, as no number of a quick run means anything")
    if options.quick and (given := [name for name in QUICK if getattr(options, name) != parser.get_default(name)]):
        parser.error(f"--quick: found --{given[0].replace('_', '-')} too, expected none, as it has sizes of its own")
    return argparse.Namespace(**vars(options) | (QUICK if options.quick else {}))


def main() -> None:
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    comparisons = {}
    for shape in [options.shape] if options.shape else CONFIGS:
        comparisons[f"training step, {shape}"] = measure(shape, options, device)
        # The next shape's graphs are others.
        torch._dynamo.reset()
    for title, comparison in comparisons.items():
        print(f"\n{title}")
        show(comparison, REFERENCE)
    if options.json:
        save(options.json, comparisons, **{k: v for k, v in vars(options).items() if k not in ("json", "quick")})


if __name__ == "__main__":
    main()
