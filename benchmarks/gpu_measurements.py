"""Steps of `on_gpu.py` that measure; "shown" in a result is what is printed at the end."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import bench_freshness
import bench_norm
import torch
from bench_layer import REFERENCE, Variant, compare_steps, make_step
from gpu_checks import DORA_FX, layer_input, whole_layer
from gpu_settings import Settings
from measuring import CONTROL, Comparison, kernel_times, show
from quiet_world import quiet_world
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from variants import MegatronBridgeLikeLinear, PEFTLikeLinear, with_dora, with_lora

from tests.models import GPT_TARGETS

INDUCTOR = {"backend": "inductor"}


def layer(settings: Settings, index: int) -> dict[str, Any]:
    """Training steps of a whole layer: times and memory of everything that is compared."""
    tokens = settings.tokens[index]
    every_call = {**DORA_FX, "options": {"weight_norm": "every_call"}}

    def adapted(attach: Callable[..., nn.Module], compiled: dict[str, Any] | None, **more: Any) -> Variant:
        return attach(whole_layer(settings, tokens), settings.dim, GPT_TARGETS, **more), compiled

    variants: dict[str, Callable[[], Variant]] = {
        REFERENCE: lambda: adapted(with_lora, INDUCTOR),
        CONTROL: lambda: adapted(with_lora, INDUCTOR),
        "dora_fx": lambda: adapted(with_dora, DORA_FX),
        "dora_fx, norm every call": lambda: adapted(with_dora, every_call),
        "base compiled": lambda: (whole_layer(settings, tokens), INDUCTOR),
        "LoRA eager": lambda: adapted(with_lora, None),
        "dora_fx eager": lambda: adapted(with_dora, None),
        "Megatron-Bridge's formula, eager": lambda: adapted(with_lora, None, linear=MegatronBridgeLikeLinear),
        "PEFT's formula, eager": lambda: adapted(with_lora, None, linear=PEFTLikeLinear),
    }
    return _compared(settings, variants, tokens)


def cuda_graphs(settings: Settings) -> dict[str, Any]:
    """The same with few tokens, where launches take longer than kernels, with and without CUDA graphs."""
    tokens = settings.tokens[0]

    def adapted(attach: Callable[..., nn.Module], compiled: dict[str, Any]) -> Variant:
        return attach(whole_layer(settings, tokens), settings.dim, GPT_TARGETS), compiled

    reduced = {"mode": "reduce-overhead"}
    variants: dict[str, Callable[[], Variant]] = {
        REFERENCE: lambda: adapted(with_lora, INDUCTOR),
        CONTROL: lambda: adapted(with_lora, INDUCTOR),
        "dora_fx": lambda: adapted(with_dora, DORA_FX),
        "LoRA, CUDA graphs": lambda: adapted(with_lora, {**INDUCTOR, **reduced}),
        "dora_fx, CUDA graphs": lambda: adapted(with_dora, {**DORA_FX, **reduced}),
    }
    result = _compared(settings, variants, tokens, keeps_gradients=True)
    counted = torch._dynamo.utils.counters["inductor"]
    return {**result, "counters": {name: count for name, count in counted.items() if "cudagraph" in name}}


def _compared(
    settings: Settings, variants: Mapping[str, Callable[[], Variant]], tokens: int, **more: Any
) -> dict[str, Any]:
    failed: dict[str, str] = {}
    with quiet_world(settings.device):
        x = layer_input(settings, tokens)
        found = compare_steps(variants, x, settings.options(tokens), settings.device, failed, **more)
    shown = _shown(found) + "".join(f"\n{name}: {reason}" for name, reason in failed.items())
    return {"ok": not failed, "tokens": tokens, **asdict(found), "failed": failed, "shown": shown}


def _shown(found: Comparison) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        show(found, REFERENCE if REFERENCE in found.table else bench_norm.REFERENCE)
    return text.getvalue().rstrip()


def kernels(settings: Settings) -> dict[str, Any]:
    """Kernels of a layer's graphs as they are generated, and as a training step of one micro-batch runs them."""
    tokens = settings.tokens[1]
    result: dict[str, Any] = {}
    if settings.warm_up:
        # What is generated is read as it is compiled, which caches would leave out.
        return result
    with quiet_world(settings.device):
        x = layer_input(settings, tokens)
        for name, attach, compiled in (("LoRA", with_lora, INDUCTOR), ("dora_fx", with_dora, DORA_FX)):
            model = attach(whole_layer(settings, tokens), settings.dim, GPT_TARGETS)
            step = make_step(torch.compile(model, **compiled), model, x, micro_batches=1)
            with fresh_cache():
                _, sources = run_and_get_code(step)
            times = kernel_times(step, settings.device)
            result[name] = {
                "generated": [_generated(source) for source in sources],
                "run": sum(count for count, _ in times.values()),
                "ms": sum(milliseconds for _, milliseconds in times.values()),
                "kernels": times,
            }
    return {**result, "shown": "\n".join(_kernel_lines(result))}


def _generated(source: str) -> dict[str, int]:
    """Products and fused kernels that the generated code of one direction calls, by the kinds of the latter."""
    calls = source[source.index("def call(") :]
    kinds = {"poi": "pointwise", "red": "reduction", "per": "persistent reduction"}
    fused = re.findall(r"^\s+triton_(poi|red|per)_\w+\.run\(", calls, re.MULTILINE)
    counts = {kinds[kind]: fused.count(kind) for kind in dict.fromkeys(fused)}
    if on_cpu := re.findall(r"^\s+cpp_fused\w*\(", calls, re.MULTILINE):
        counts["C++"] = len(on_cpu)
    return {"products": len(re.findall(r"(?:extern_kernels|aten)\.(?:add|b)?mm\w*\(", calls)), **counts}


def _kernel_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, row in result.items():
        lines += [f"{name}: generated {row['generated']}", f"{row['run']} run, {row['ms']:.2f} ms; the longest:"]
        longest = list(row["kernels"].items())[:8]
        lines += [f"{milliseconds:9.3f} ms {count:4} x {kernel[:80]}" for kernel, (count, milliseconds) in longest]
    return lines


def norms(settings: Settings) -> dict[str, Any]:
    """The norms of one weight, as `bench_norm.py` compares them."""
    found, shown = {}, []
    for text in settings.norms if not settings.warm_up else ():
        shape = bench_norm.parse_shape(text)
        with torch.no_grad():
            comparison = bench_norm.measure(shape, torch.bfloat16, settings.device, settings.rounds)
        found[text] = asdict(comparison)
        shown.append(f"{text} bf16\n{_shown(comparison)}")
    return {"norms": found, "shown": "\n".join(shown)}


def looks(settings: Settings) -> dict[str, Any]:
    """The look at the parameters before each forward pass, as `bench_freshness.py` measures it."""
    rows = {}
    with quiet_world(settings.device):
        for tokens in dict.fromkeys(settings.tokens[:2]):
            rows[str(tokens)] = bench_freshness.measure(settings.options(tokens), settings.device)
    lines = [f"{tokens} tokens: {row}" for tokens, row in rows.items()]
    return {"looks": rows, "shown": "\n".join(lines)}
