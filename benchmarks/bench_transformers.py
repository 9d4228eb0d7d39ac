r"""What does a training step of a transformers model cost, beside PEFT's LoRA and DoRA?

Four layers of SmolLM2-135M's and of Qwen2-0.5B's shape with random weights, some micro-batches forward and backward and
a step of AdamW. dora_fx is compiled by `compile_model`; PEFT's adapters are compiled as their users do it, layer by
layer. All variants of a shape run in turn within one round, and each round gives ratios to compiled LoRA.

    python benchmarks/bench_transformers.py --json benchmarks/results/transformers.json
    python benchmarks/bench_transformers.py --quick
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_model import DTYPES, HF_TARGETS, Variant
from measuring import CONTROL, Comparison, compare, peak_bytes, save, show
from quick_option import parse_with_quick
from torch import nn
from torch._inductor.utils import fresh_cache
from variants import with_dora, with_peft

import dora_fx

LORA_COMPILED, LORA_EAGER = "PEFT LoRA compiled", "PEFT LoRA eager"
REFERENCE = LORA_COMPILED
SMOLLM2, QWEN2 = "SmolLM2-135M", "Qwen2-0.5B"
CONFIGS: dict[str, type[Any]] = {SMOLLM2: transformers.LlamaConfig, QWEN2: transformers.Qwen2Config}
SIZES = {
    SMOLLM2: {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    QWEN2: {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
# What `--quick` puts in place of the other options.
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


def make_variants(
    make_base: Callable[[], Any], reference: str, options: argparse.Namespace, device: str
) -> dict[str, Variant]:
    """Every variant by name, with the reference and its control in front."""
    tokens = torch.randint(0, options.vocab, (options.batch, options.tokens), device=device)

    def losses(model: nn.Module) -> torch.Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    def peft(*, use_dora: bool, compiles: bool) -> Variant:
        base = make_base()
        model = with_peft(base, options.dim, HF_TARGETS, use_dora=use_dora)
        for layer in base.model.layers if compiles else ():
            layer.compile()
        return Variant(model, losses, options.micro_batches)

    def ours(*, compiles: bool) -> Variant:
        model = with_dora(make_base(), options.dim, HF_TARGETS)
        return Variant(dora_fx.compile_model(model) if compiles else model, losses, options.micro_batches)

    makers: dict[str, Callable[[], Variant]] = {
        LORA_COMPILED: lambda: peft(use_dora=False, compiles=True),
        LORA_EAGER: lambda: peft(use_dora=False, compiles=False),
        "dora_fx compiled": lambda: ours(compiles=True),
        "dora_fx eager": lambda: ours(compiles=False),
        "PEFT DoRA compiled": lambda: peft(use_dora=True, compiles=True),
        "PEFT DoRA eager": lambda: peft(use_dora=True, compiles=False),
    }
    first = {reference: makers[reference], CONTROL: makers[reference]}
    return {name: make() for name, make in (first | makers).items()}


def measure(make_base: Callable[[], Any], reference: str, options: argparse.Namespace, device: str) -> Comparison:
    """Training steps of every variant.

    Args:
        make_base: makes a model with the same weights in every call.
        reference: the variant that all are compared with.
        options: of `parse`.
    """
    variants = make_variants(make_base, reference, options, device)
    steps = {name: variant.train_step for name, variant in variants.items()}
    extra = {}
    for name, step in steps.items():
        with fresh_cache():
            begin = time.perf_counter()
            step()
            # The control finds what the reference compiled.
            extra[name] = {} if name == CONTROL else {"first step s": time.perf_counter() - begin}
        extra[name]["peak MiB"] = peak_bytes(step, device) / 2**20
    found = compare(steps, reference, device, rounds=options.rounds, max_rounds=options.max_rounds)
    return replace(found, table={name: row | extra[name] for name, row in found.table.items()})


def parse(description: str | None, shapes: Collection[str] = ()) -> argparse.Namespace:
    """The options of a command, which may choose among several shapes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "tokens": 256, "batch": 1, "micro-batches": 1, "vocab": 1024, "dim": 16}
    for name, default in (sizes | {"rounds": 9, "max-rounds": 90}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    if shapes:
        parser.add_argument("--shape", choices=shapes, help="default all")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, help="write the tables here")
    return parse_with_quick(parser, QUICK)


def saved_options(options: argparse.Namespace) -> dict[str, Any]:
    """What a file with results says of the command."""
    return {name: value for name, value in vars(options).items() if name not in ("json", "quick")}


def main() -> None:
    options = parse(__doc__, CONFIGS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    comparisons = {}
    for shape in [options.shape] if options.shape else CONFIGS:
        make_base = partial(base_model, shape, options, device)
        comparisons[f"training step, {shape}"] = measure(make_base, REFERENCE, options, device)
        # The next shape's graphs are others.
        torch._dynamo.reset()
    for title, comparison in comparisons.items():
        print(f"\n{title}")
        show(comparison, REFERENCE)
    if options.json:
        save(options.json, comparisons, **saved_options(options))


if __name__ == "__main__":
    main()
