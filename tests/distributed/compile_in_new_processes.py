"""Compile with torch's caches in a folder, as a program: what another start of a training job finds there.

    python -m tests.distributed.compile_in_new_processes RANK NAME TP CACHE RESULTS

is one of TP ranks. NAME is a key of `MODELS`. It leaves what it computed and what the caches counted in RESULTS/RANK.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import dora_fx
from tests.closeness import roundings_of
from tests.distributed.launch import enter_rank
from tests.distributed.zoo import BATCH, HIDDEN, Topology, Zoo, set_adapter_values, whole_values
from tests.models import GPT_TARGETS, SEQUENCE, tiny_gpt, token_ids, trainable

# The parameters' owner, the function to compile, and the loss of it or of what was compiled.
Model = tuple[nn.Module, Callable[..., Any], Callable[[Callable[..., Any]], torch.Tensor]]


def layers(tp: int, *, dropout: float = 0.1, recompute: bool = False) -> Model:
    """A gated MLP and a layer whose graph is another one on every rank."""
    topology = Topology(tp=tp)
    model = Zoo(topology, torch.float32, dropout, ["gated_mlp", "column_gather_output"])
    set_adapter_values(model, topology)
    inputs = {name: whole_values((SEQUENCE, BATCH, HIDDEN), f"{name}.x", 1.0).float() for name in model.names}

    def outputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return checkpoint(model, inputs, use_reentrant=False) if recompute else model(inputs)

    def loss(call: Callable[..., Any]) -> torch.Tensor:
        return torch.stack([output.square().mean() for output in call(inputs).values()]).sum()

    return model, outputs, loss


def gpt(tp: int) -> Model:
    """A GPT with its loss; its embedding, its output layer and its cross entropy are Megatron's own."""
    model = dora_fx.DoRA(GPT_TARGETS, dim=4, alpha=8, dropout=0.1)(
        tiny_gpt(num_layers=1, tensor_model_parallel_size=tp)
    )
    set_adapter_values(model, Topology(tp=tp))
    tokens = token_ids()
    positions = torch.arange(SEQUENCE).expand_as(tokens)
    future = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]

    def loss(call: Callable[..., Any]) -> torch.Tensor:
        return call(tokens, positions, future, labels=tokens).mean()

    return model, model, loss


MODELS: dict[str, Callable[[int], Model]] = {
    "layers": layers,
    "recomputed layers": partial(layers, recompute=True),
    "gpt": gpt,
}


def results(model: nn.Module, loss: Callable[..., torch.Tensor], call: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Loss and all gradients of one step."""
    torch.manual_seed(4)
    model.zero_grad()
    value = loss(call)
    value.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    return {"loss": value.detach(), **gradients}


def compile_and_report(name: str, tp: int, folder: str) -> None:
    model, function, loss = MODELS[name](tp)
    eager = results(model, loss, function)
    counters.clear()
    with functorch_config.patch(strict_autograd_cache=True):
        compiled = results(model, loss, torch.compile(function, backend="dora_fx", fullgraph=True))
    counted = {key: dict(counters[key]) for key in ("aot_autograd", "inductor")}
    report = {"eager": eager, "compiled": compiled, "roundings": 3 * roundings_of(model), **counted}
    torch.save(report, Path(folder) / str(dist.get_rank()))


def main(rank: str, name: str, tp: str, cache: str, folder: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    enter_rank(int(rank), folder, compile_and_report, int(tp), int(tp), (name, int(tp), folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
