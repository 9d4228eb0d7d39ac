r"""What does a training step of a base in 4 bits cost, beside PEFT's LoRA and DoRA on the same base?

Four layers of SmolLM2-135M's shape with random weights in NF4 with double quantisation, one batch forward and backward
and a step of AdamW. dora_fx is compiled by `compile_model`; PEFT's adapters are compiled as their users do it, layer by
layer, where Dynamo takes them whole. All variants run in turn within one round, and each round gives ratios to eager
LoRA, which is what most people run.

    python -m pip install bitsandbytes
    python benchmarks/bench_quantised.py --json benchmarks/results/quantised.json
    python benchmarks/bench_quantised.py --quick
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_model import DTYPES, HF_TARGETS, Variant
from bench_transformers import SIZES, SMOLLM2
from measuring import CONTROL, Comparison, compare, peak_bytes, save, show
from torch import nn
from torch._inductor.utils import fresh_cache
from variants import with_dora, with_peft

import dora_fx

REFERENCE = "PEFT LoRA eager"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
# What `--quick` puts in place of the other options: everything runs once, and no number means anything.
QUICK = {"layers": 2, "tokens": 16, "vocab": 64, "dim": 4, "rounds": 1, "max_rounds": 1}


def write_base(folder: Path, options: argparse.Namespace) -> None:
    """A base of random weights for every variant to quantise alike."""
    config = transformers.LlamaConfig(
        **(TINY if options.quick else SIZES[SMOLLM2]),
        num_hidden_layers=options.layers,
        vocab_size=options.vocab,
        max_position_embeddings=options.tokens,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(DTYPES[options.dtype]).save_pretrained(folder)


def base_model(folder: Path, options: argparse.Namespace, device: str) -> Any:
    dtype = DTYPES[options.dtype]
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype, device_map=device
    )
    return model.train()


def make_variants(folder: Path, options: argparse.Namespace, device: str) -> dict[str, Variant]:
    tokens = torch.randint(0, options.vocab, (options.batch, options.tokens), device=device)

    def losses(model: nn.Module) -> torch.Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    def peft(*, use_dora: bool, compiles: bool = False) -> Variant:
        base = base_model(folder, options, device)
        model = with_peft(base, options.dim, HF_TARGETS, use_dora=use_dora)
        for layer in base.model.layers if compiles else ():
            layer.compile()
        return Variant(model, losses, 1)

    def ours(*, compiles: bool) -> Variant:
        model = with_dora(base_model(folder, options, device), options.dim, HF_TARGETS)
        return Variant(dora_fx.compile_model(model) if compiles else model, losses, 1)

    makers: dict[str, Callable[[], Variant]] = {
        REFERENCE: lambda: peft(use_dora=False),
        CONTROL: lambda: peft(use_dora=False),
        "PEFT LoRA compiled": lambda: peft(use_dora=False, compiles=True),
        "dora_fx compiled": lambda: ours(compiles=True),
        "dora_fx eager": lambda: ours(compiles=False),
        "PEFT DoRA compiled": lambda: peft(use_dora=True, compiles=True),
        "PEFT DoRA eager": lambda: peft(use_dora=True),
    }
    return {name: make() for name, make in makers.items()}


def measure(folder: Path, options: argparse.Namespace, device: str) -> Comparison:
    variants = make_variants(folder, options, device)
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
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), options)
        comparison = measure(Path(folder), options, device)
    title = f"training step, {SMOLLM2} in NF4"
    print(f"\n{title}")
    show(comparison, REFERENCE)
    if options.json:
        save(
            options.json, {title: comparison}, **{k: v for k, v in vars(options).items() if k not in ("json", "quick")}
        )


if __name__ == "__main__":
    main()
