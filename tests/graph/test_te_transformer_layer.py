"""A transformer layer of Megatron's spec for Transformer Engine, with emulated kernels: where its graphs break."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dora_fx
from tests.closeness import assert_close, rounding
from tests.distributed.launch import run_ranks
from tests.graph.sites import config
from tests.models import randomize_adapters
from tests.recording_backend import RecordingBackend

pytestmark = pytest.mark.usefixtures("emulated_te")

HIDDEN, SEQUENCE, BATCH = 48, 8, 2


def transformer_layer(*, local_attention: bool) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.spec_utils import build_module

    settings = dict(ffn_hidden_size=64, num_query_groups=4, gated_linear_unit=True, activation_func=F.silu)
    settings |= dict(hidden_dropout=0.0, attention_dropout=0.0, add_bias_linear=False, normalization="RMSNorm")
    spec = get_gpt_layer_with_transformer_engine_spec()
    if local_attention:
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    layer = build_module(spec, config=config(**settings), layer_number=1)
    dora_fx.DoRA(["*.linear_*"], dim=4, alpha=8)(layer)
    randomize_adapters(layer)
    return layer


def compiled_layer(local_attention: bool) -> dict[str, Any]:
    """Graphs of the layer, functions of dora_fx in each, breaks by where they are, and outputs and input gradients."""
    warnings.simplefilter("ignore")
    layer = transformer_layer(local_attention=local_attention)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
    future = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1) if local_attention else None
    backend = RecordingBackend()
    results = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=local_attention)):
        output, _ = function(x, attention_mask=future)
        [dx] = torch.autograd.grad(output.square().sum(), x)
        results.append({"y": output.detach(), "dx": dx})
    functions = [[getattr(node.target, "__name__", "") for node in graph.graph.nodes] for graph in backend.after]
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    return {"results": results, "functions": functions, "breaks": breaks}


@pytest.mark.parametrize("local_attention", [False, True])
def test_graphs_of_a_layer_emulated_kernels(local_attention):
    found = run_ranks(compiled_layer, 1, 1, local_attention)
    eager, compiled = found["results"]
    assert_close(compiled, eager, rounding(torch.float32, 4 * HIDDEN))
    functions = found["functions"]
    # Both norms and all four products are in graphs, and no marker is left; the scales of qkv and fc1 are split.
    names = [name for graph in functions for name in graph]
    assert names.count("rms_norm") == 2 and names.count("linear") == 12 and "dora_linear" not in names
    assert names.count("scale_rows") == 7
    if local_attention:
        assert len(functions) == 1 and not found["breaks"]
    else:
        # What is in front of attention, attention's own products, as it gets queries, keys and values that are no views
        # of one tensor, linear_proj, the residual sum, and the rest of the layer. Each break is that of Transformer
        # Engine's attention, which runs uncompiled where it says so.
        assert len(functions) == 5
        assert all("report_and_run" in reason for reason in found["breaks"])
