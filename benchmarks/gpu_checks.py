"""Steps of `on_gpu.py` that say whether results are right.

"ok" in a result says so, and "shown" is what is printed at the end.
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from bench_layer import DTYPES
from gpu_settings import Settings
from measuring import surroundings
from megatron.core.models.gpt import GPTModel
from quiet_world import quiet_world
from torch import nn
from variants import WholeLayer, torch_attention_spec, with_dora

import dora_fx
from tests.closeness import relative_error, rounding, roundings_of
from tests.models import GPT_SHAPE, GPT_TARGETS, IN, OUT, VOCAB, LinearZoo, adapt_zoo, config, randomize_adapters, sites
from tests.oracle import Results, expected_zoo_results, put_reference_into, zoo_results

# torch 2.11 cannot write the functions that Dynamo is to skip into its metrics, and says so for every graph.
logging.getLogger("torch._dynamo.metrics_context").setLevel(logging.CRITICAL)

DORA_FX = {"backend": "dora_fx"}


def machine(settings: Settings) -> dict[str, Any]:
    """Names and versions of what everything runs on.

    Raises:
        RuntimeError: there is no CUDA device for `--device cuda`.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: found no CUDA device, expected one, or --device cpu")
    about = {**surroundings(), "python": platform.python_version(), "dora_fx": dora_fx.__version__}
    with contextlib.suppress(ImportError):
        import triton

        about["triton"] = triton.__version__
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
        about |= {"GiB": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
    return about


def whole_layer(settings: Settings, tokens: int) -> nn.Module:
    """A frozen layer of the settings' shape in bfloat16."""
    sizes = (settings.hidden, settings.ffn, settings.heads, settings.groups)
    return WholeLayer(*sizes, tokens, torch.bfloat16, settings.device)


def layer_input(settings: Settings, tokens: int) -> torch.Tensor:
    """An input of it `[tokens, 1, hidden]`, which takes a gradient."""
    x = torch.randn(tokens, 1, settings.hidden, dtype=torch.bfloat16, device=settings.device)
    return x.requires_grad_()


def correctness(settings: Settings, dtype_name: str, dropout: float) -> dict[str, Any]:
    """Every kind of layer, eager and compiled, against the oracle in float64.

    Bounds are four times the error of the paper's formula in the same dtype on the same device, for each tensor.
    """
    dtype, device = DTYPES[dtype_name], settings.device
    errors: dict[str, dict[str, Any]] = {}
    with quiet_world(device):
        for compiler in ("eager", "dora_fx"):
            torch.manual_seed(0)
            kinds = None if compiler == "eager" or settings.kinds is None else list(settings.kinds)
            zoo = adapt_zoo(LinearZoo(kinds).to(device, dtype), dropout=dropout)
            inputs, targets = (
                {kind: torch.randn(64, features, dtype=dtype, device=device) for kind in zoo.kinds}
                for features in (IN, OUT)
            )
            call = zoo if compiler == "eager" else torch.compile(zoo, fullgraph=True, **DORA_FX)
            found = zoo_results(zoo, call, inputs, targets)
            exact = expected_zoo_results(zoo, inputs, targets)
            rounded = expected_zoo_results(zoo, inputs, targets, dtype)
            for kind in zoo.kinds:
                errors[f"{kind}, {compiler}"] = _errors(found[kind], rounded[kind], exact[kind])
    return _judged(errors)


def correctness_of_layer(settings: Settings) -> dict[str, Any]:
    """A whole layer of the large shape in bfloat16, eager and compiled, against the oracle in its linear layers."""
    tokens = settings.tokens[0]
    errors = {}
    with quiet_world(settings.device):
        base, x = whole_layer(settings, tokens), layer_input(settings, tokens)
        twin = whole_layer(settings, tokens).double()
        twin.load_state_dict(base.state_dict())
        adapted = with_dora(base, settings.dim, GPT_TARGETS)
        randomize_adapters(adapted)
        put_reference_into(twin, adapted)
        weights = torch.randn(tokens, 1, settings.hidden, device=settings.device)
        exact = _layer_results(twin, twin, x.double(), weights)
        # Positions stay in float32.
        twin.to(torch.bfloat16).rotary = adapted.rotary
        rounded = _layer_results(twin, twin, x, weights)
        for compiler in ("eager", "dora_fx"):
            call = adapted if compiler == "eager" else torch.compile(adapted, fullgraph=True, **DORA_FX)
            errors[f"layer, {compiler}"] = _errors(_layer_results(call, adapted, x, weights), rounded, exact)
    return _judged(errors)


def _layer_results(call: Callable[..., Any], model: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> Results:
    """Output and gradients, under names that the adapted layer and the one of oracles share."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    output = call(x)[0]
    (output * weights).sum().backward()
    results: Results = {"output": output.detach(), "grad of x": x.grad}
    names = {"linear_in.weight": "lora_a", "linear_out.weight": "lora_b", "weight_magnitude": "magnitude"}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            site, _, name = path.replace("adapter.", "").partition("linear_")
            site, name = f"linear_{name}".split(".", 1)
            results[f"grad of {site} {names.get(name, name)}"] = parameter.grad
    return results


def _errors(found: Results, rounded: Results, exact: Results) -> dict[str, Any]:
    """The tensor that is furthest off for its bound, with both."""
    assert found.keys() == rounded.keys() == exact.keys(), f"{sorted(found)} and {sorted(exact)}"
    rows = {
        what: (relative_error(found[what], value), 4.0 * relative_error(rounded[what], value))
        for what, value in exact.items()
    }
    worst = max(rows, key=lambda what: rows[what][0] / max(rows[what][1], 1e-30))
    error, bound = rows[worst]
    return {"of": worst, "error": error, "bound": bound, "ok": all(own <= limit for own, limit in rows.values())}


def _judged(errors: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    width = max(map(len, errors))
    lines = [f"{name:{width}} {row['error']:.1e} <= {row['bound']:.1e}  {row['of']}" for name, row in errors.items()]
    return {"ok": all(row["ok"] for row in errors.values()), "errors": dict(errors), "shown": "\n".join(lines)}


def training(settings: Settings) -> dict[str, Any]:
    """Losses of a tiny GPT that is trained eagerly, compiled, and compiled with CUDA graphs."""
    modes: dict[str, dict[str, Any] | None] = {"eager": None, "dora_fx": {}}
    modes["dora_fx, CUDA graphs"] = {"mode": "reduce-overhead"}
    losses: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, compiled in modes.items():
        try:
            with quiet_world(settings.device):
                losses[name], bound = _losses(settings, compiled)
        except Exception as error:
            if name != "dora_fx, CUDA graphs":
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    eager = losses["eager"]
    apart = {name: max(abs(a - b) / b for a, b in zip(row, eager, strict=True)) for name, row in losses.items()}
    falls = eager[-1] < eager[0]
    lines = [f"{name}: {row[0]:.6f} -> {row[-1]:.6f}, {apart[name]:.1e} from eager" for name, row in losses.items()]
    lines += [f"{name}: {reason}" for name, reason in failed.items()]
    ok = falls and not failed and all(difference <= bound for difference in apart.values())
    return {"ok": ok, "losses": losses, "apart": apart, "bound": bound, "failed": failed, "shown": "\n".join(lines)}


def _losses(settings: Settings, compiled: dict[str, Any] | None, steps: int = 10) -> tuple[list[float], float]:
    """Losses of training steps in float32 from the same start, and how far rounding may take them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = GPTModel(
        config=config(num_layers=2, **GPT_SHAPE),
        transformer_layer_spec=torch_attention_spec(),
        vocab_size=VOCAB,
        max_sequence_length=32,
        position_embedding_type="rope",
    ).to(settings.device)
    with_dora(model, settings.dim, GPT_TARGETS)
    if compiled is not None:
        dora_fx.compile_model(model, **compiled)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Outside of the memory of CUDA graphs, whose next replay would overwrite them.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tokens = torch.randint(0, VOCAB, (2, 33), generator=torch.Generator().manual_seed(5)).to(settings.device)
    positions = torch.arange(32, device=settings.device).expand(2, -1)
    losses = []
    for _ in range(steps):
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append(float(loss))
    return losses, rounding(torch.float32, 2 * steps * roundings_of(*sites(model).values()))
