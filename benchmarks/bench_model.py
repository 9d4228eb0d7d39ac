r"""What does DoRA cost in a whole GPT, beside LoRA: training, evaluation, memory, compilation?

A Llama-shaped Megatron GPT, compiled layer by layer: an optimizer step of some micro-batches, and a forward pass in
evaluation, of the base and of merged adapters too. PEFT adapts the same weights in transformers' model. All variants
run in turn within one round, and each round gives ratios to LoRA.

    python benchmarks/bench_model.py
    python benchmarks/bench_model.py --layers 8 --hidden 4096 --ffn 12288 --heads 32 --groups 8 --tokens 4096 \
        --dtype bf16
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import CONTROL, Comparison, compare, peak_bytes, save, show
from quiet_world import quiet_world
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint
from variants import TorchAttention, with_dora, with_lora, with_peft

import dora_fx
from dora_fx.compilation import like_a_layer_output
from dora_fx.models import build_gpt_model, causal_mask

REFERENCE, DORA = "LoRA", "dora_fx"
BASE, NORM_EVERY_CALL, MERGED = "base", "dora_fx, norm every call", "dora_fx merged"
PEFT_LORA, PEFT_DORA = "PEFT LoRA eager", "PEFT DoRA eager"
VARIANTS = (BASE, REFERENCE, CONTROL, DORA, NORM_EVERY_CALL, MERGED, PEFT_LORA, PEFT_DORA)
EVALUATED_ONLY = (BASE, MERGED)
MEGATRON_TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTIONS = ["megatron", "torch"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Variant:
    """One model and what is measured of it."""

    def __init__(self, model: nn.Module, losses: Callable[[nn.Module], torch.Tensor], micro_batches: int) -> None:
        self.model, self._losses, self._micro_batches = model, losses, micro_batches
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._trained, lr=1e-4)

    def train_step(self) -> None:
        self.model.train()
        for _ in range(self._micro_batches):
            self._losses(self.model).mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def allocate_buffers(self) -> None:
        """Run uncompiled: Megatron makes its buffer for attention scores in the first pass, which Dynamo guards on."""
        with torch.compiler.set_stance("force_eager"):
            self._losses(self.model)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        self._losses(self.model)


def hf_model(options: argparse.Namespace, device: str) -> Any:
    """A transformers Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_attention_heads=options.heads,
        num_key_value_heads=options.groups,
        vocab_size=options.vocab,
        max_position_embeddings=options.tokens,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device=device, dtype=DTYPES[options.dtype])


def megatron_model(options: argparse.Namespace, device: str) -> Any:
    """The same function and weights as Megatron's GPTModel."""
    source = hf_model(options, device)
    model = build_gpt_model(source.config, source.state_dict(), dtype=DTYPES[options.dtype], device=device)
    if options.attention == "torch":
        for layer in model.decoder.layers:
            layer.self_attention.core_attention = TorchAttention()
    return model


def make_variants(options: argparse.Namespace, device: str, names: Collection[str]) -> dict[str, Variant]:
    """Variants of these names."""
    tokens = torch.randint(0, options.vocab, (1, options.tokens + 1), device=device)
    positions = torch.arange(options.tokens, device=device)[None]
    mask = causal_mask(options.tokens, device)

    def megatron_losses(model: nn.Module) -> torch.Tensor:
        return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def hf_losses(model: nn.Module) -> torch.Tensor:
        return model(tokens[:, :-1], labels=tokens[:, 1:], use_cache=False).loss

    def megatron(attach: Callable[..., nn.Module], **settings: Any) -> Variant:
        model = attach(megatron_model(options, device), options.dim, MEGATRON_TARGETS)
        compile_layers(model, options, settings)
        return Variant(model, megatron_losses, options.micro_batches)

    def huggingface(*, use_dora: bool) -> Variant:
        base = hf_model(options, device)
        if options.recompute:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = with_peft(base, options.dim, HF_TARGETS, use_dora=use_dora)
        return Variant(model, hf_losses, options.micro_batches)

    every_call = {"weight_norm": "every_call"}
    makers: dict[str, Callable[[], Variant]] = {
        BASE: lambda: megatron(lambda model, *_: model.requires_grad_(False), backend="inductor"),
        REFERENCE: lambda: megatron(with_lora, backend="inductor"),
        CONTROL: lambda: megatron(with_lora, backend="inductor"),
        DORA: lambda: megatron(with_dora, backend="dora_fx"),
        NORM_EVERY_CALL: lambda: megatron(with_dora, backend="dora_fx", options=every_call),
        MERGED: lambda: megatron(with_dora, backend="dora_fx"),
        PEFT_LORA: lambda: huggingface(use_dora=False),
        PEFT_DORA: lambda: huggingface(use_dora=True),
    }
    return {name: make() for name, make in makers.items() if name in names}


def compile_layers(model: Any, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Compile each layer by itself; with recomputation, inside a checkpoint."""
    if settings["backend"] == "dora_fx":
        dora_fx.compile_model(model, **settings.get("options", {}))
    else:
        # As `compile_model` does for its own backend.
        model.embedding.register_forward_hook(like_a_layer_output)
        for layer in model.decoder.layers:
            layer.compile(fullgraph=True, **settings)
    for layer in model.decoder.layers:
        if options.recompute:
            compiled = layer.forward
            layer.forward = lambda *args, f=compiled, **kwargs: checkpoint(f, *args, use_reentrant=False, **kwargs)


def measure(options: argparse.Namespace, device: str) -> dict[str, Comparison]:
    variants = make_variants(options, device, {*options.variants, REFERENCE, CONTROL})
    trains = options.only != "evaluation"
    steps = {name: variant.train_step for name, variant in variants.items() if trains and name not in EVALUATED_ONLY}
    evaluations = {name: variant.evaluate for name, variant in variants.items()}
    extra = {}
    for name, variant in variants.items():
        variant.allocate_buffers()
        if name == MERGED:
            dora_fx.merge(variant.model, keep_adapter=True)
        with fresh_cache():
            if name in steps:
                begin = time.perf_counter()
                steps[name]()
                # The control finds what the reference compiled.
                extra[name] = {} if name == CONTROL else {"first step s": time.perf_counter() - begin}
            evaluations[name]()
        if name in steps:
            extra[name]["peak MiB"] = peak_bytes(steps[name], device) / 2**20
    rounds = {"rounds": options.rounds, "max_rounds": options.max_rounds}
    found = {}
    if trains:
        training = compare(steps, REFERENCE, device, **rounds)
        table = {name: row | extra[name] for name, row in training.table.items()}
        found["training step"] = replace(training, table=table)
    if options.only != "training":
        found["evaluation"] = compare(evaluations, REFERENCE, device, **rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 2, "hidden": 576, "ffn": 1536, "heads": 9, "groups": 3, "vocab": 1024, "dim": 16}
    sizes |= {"tokens": 256, "micro-batches": 8, "rounds": 7, "max-rounds": 28}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--only", choices=["training", "evaluation"], help="default both")
    parser.add_argument("--attention", choices=ATTENTIONS, default="megatron", help="torch's keeps no scores")
    of_names = f"of {' | '.join(VARIANTS)}; {REFERENCE} and its {CONTROL} are always measured; default all"
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=of_names)
    parser.add_argument("--recompute", action="store_true", help="checkpoint every layer")
    parser.add_argument("--json", type=Path, help="write the tables here")
    options = parser.parse_args()
    if options.only == "training" and (untrained := set(EVALUATED_ONLY).intersection(options.variants or ())):
        parser.error(f"--variants: found {', '.join(sorted(untrained))} and --only training, expected what is trained")
    options.variants = options.variants or VARIANTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_world(device):
        comparisons = measure(options, device)
    for title, comparison in comparisons.items():
        print(f"\n{title}")
        show(comparison, REFERENCE)
    if options.json:
        save(options.json, comparisons, **{k: v for k, v in vars(options).items() if k != "json"})


if __name__ == "__main__":
    main()
