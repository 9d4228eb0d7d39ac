"""Adapted layers over Transformer Engine, their graphs and their collectives, for processes that have it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import dora_fx
from benchmarks.collective_counts import CollectiveCounts, count_collectives
from tests.graph.capture import capture
from tests.graph.conftest import fake_world
from tests.graph.sites import DIM, IN, OUT, OneLinear, adapted, config
from tests.recording_backend import RecordingBackend, graph_text

SEQUENCE, BATCH = 8, 3


def te_layer(name: str, in_features: int = IN, out_features: int = OUT, **settings: Any) -> nn.Module:
    """One of Megatron's layers over Transformer Engine `[out_features, in_features]`; settings go into its config."""
    from megatron.core.extensions import transformer_engine as layers

    own = {
        "TELayerNormColumnParallelLinear": dict(gather_output=False, is_expert=False),
        "TEColumnParallelLinear": dict(gather_output=False, is_expert=False),
        "TERowParallelLinear": dict(input_is_parallel=True, is_expert=False),
        "TELinear": dict(parallel_mode="duplicated", skip_weight_param_allocation=False),
    }[name]
    bias, skip_bias_add = settings.pop("bias", False), settings.pop("skip_bias_add", True)
    return getattr(layers, name)(
        in_features,
        out_features,
        config=config(**({"normalization": "RMSNorm"} | settings)),
        init_method=nn.init.normal_,
        bias=bias,
        skip_bias_add=skip_bias_add,
        **own,
    )


def text_of(name: str, tp: int, sequence_parallel: bool, dropout: float, before: bool, settings: dict[str, Any]) -> str:
    """Golden text of one adapted layer on rank 0 of a fake world."""
    warnings.simplefilter("ignore")
    with fake_world(tp):
        layer = te_layer(name, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, **settings)
        features = IN // tp if "Row" in name else IN
        backend = capture(adapted(layer, dropout=dropout), features, sequence=SEQUENCE)
        return graph_text((backend.before if before else backend.after)[0])


CASES = {
    "norm_column": "TELayerNormColumnParallelLinear",
    "column": "TEColumnParallelLinear",
    "row": "TERowParallelLinear",
    "duplicated": "TELinear",
}


def added_collectives(
    name: str, tp: int, sequence_parallel: bool, dropout: float, compiled: bool, dtype: torch.dtype = torch.float32
) -> dict[str, dict[tuple[str, int], int]]:
    """What an adapted layer sends more than the layer itself, which runs Transformer Engine's own code; and less."""
    warnings.simplefilter("ignore")
    with fake_world(tp):
        parallel = "Row" in CASES[name]
        tokens = SEQUENCE // tp if sequence_parallel and not parallel else SEQUENCE
        settings = dict(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel, params_dtype=dtype)

        def counts(adapts: bool) -> CollectiveCounts:
            torch._dynamo.reset()
            x = torch.randn(tokens, BATCH, IN // tp if parallel else IN, dtype=dtype, requires_grad=True)
            layer = te_layer(CASES[name], **settings)
            if not adapts:
                return count_collectives(OneLinear(layer).requires_grad_(False), x)
            model = adapted(layer, dropout=dropout)
            options = {"inner_compiler": "aot_eager"}
            function = torch.compile(model, backend="dora_fx", options=options, fullgraph=True) if compiled else model
            return count_collectives(function, x)

        base, own = counts(False), counts(True)
        added, removed = own - base, base - own
        return {
            "once": dict(added.once_per_step),
            "forward": dict(added.forward),
            "backward": dict(added.backward),
            "removed": dict(removed.forward) | dict(removed.backward),
        }


class Chain(nn.Module):
    """Column with norm, row, duplicated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.linear_up = te_layer("TELayerNormColumnParallelLinear", IN, OUT, **settings)
        self.linear_back = te_layer("TERowParallelLinear", OUT, IN, bias=True, **settings)
        self.linear_down = te_layer("TELinear", IN, OUT, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.linear_up(x)
        output, bias = self.linear_back(F.gelu(hidden))
        return self.linear_down(x + output + bias)[0]


def graphs_of_chain(tp: int, sequence_parallel: bool) -> tuple[int, list[str], dict[tuple[str, int], int]]:
    """Number of graphs, functions of dora_fx in the rewritten one, and the collectives of its backward pass."""
    warnings.simplefilter("ignore")
    with fake_world(tp):
        model = Chain(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
        dora_fx.DoRA(["linear_*"], dim=DIM)(model)
        backend = RecordingBackend()
        tokens = SEQUENCE // tp if sequence_parallel else SEQUENCE
        x = torch.randn(tokens, BATCH, IN, requires_grad=True)
        torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
        names = [
            node.target.__name__
            for graph in backend.after
            for node in graph.graph.nodes
            if (getattr(node.target, "__module__", None) or "").startswith("dora_fx")
        ]
        options = {"inner_compiler": "aot_eager"}
        torch._dynamo.reset()
        counts = count_collectives(torch.compile(model, backend="dora_fx", options=options, fullgraph=True), x)
        return len(backend.after), names, dict(counts.backward)
