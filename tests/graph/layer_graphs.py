"""Layers under tensor parallelism whose graphs before and after the passes are described and drawn in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx.explanation import TensorFacts, kept_for_backward, names_in_layer
from dora_fx.models.specs import FrozenRMSNorm
from tests.graph.conftest import fake_world
from tests.graph.sites import IN, adapted, column, row
from tests.models import GPT_SHAPE, GPT_TARGETS, config
from tests.recording_backend import RecordingBackend

TP, SEQUENCE, BATCH = 2, 8, 1
PARALLEL: dict[str, Any] = {"tensor_model_parallel_size": TP, "sequence_parallel": True}


class LayerGraphs(RecordingBackend):
    """The graphs of one layer before and after the passes, and what the compiled one keeps for its backward pass."""

    kept: dict[str, tuple[TensorFacts, ...]]
    forward: fx.Graph
    backward: fx.Graph | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        super().__call__(gm, example_inputs)
        names = names_in_layer(self.after[-1])
        num_outputs = len(self.after[-1].graph.find_nodes(op="output")[0].args[0])

        def note_forward(forward: fx.GraphModule, example_inputs: Any) -> Any:
            self.forward = forward.graph
            self.kept = kept_for_backward(forward.graph, num_outputs, names)
            return make_boxed_func(forward)

        def note_backward(backward: fx.GraphModule, example_inputs: Any) -> Any:
            self.backward = backward.graph
            return make_boxed_func(backward)

        compiled = aot_autograd(
            fw_compiler=note_forward,
            bw_compiler=note_backward,
            partition_fn=min_cut_rematerialization_partition,
        )
        return compiled(self.after[-1], example_inputs)


def graphs_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> LayerGraphs:
    """Compile a function of hidden states, and run it and its gradient once."""
    torch._dynamo.reset()
    graphs = LayerGraphs()
    output = torch.compile(function, backend=graphs, fullgraph=True)(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    # Gradients of parameters are computed as well, and go nowhere: some could be completed in Megatron's wrapper alone.
    if output.requires_grad:
        torch.autograd.grad(output.sum(), args[0])
    assert len(graphs.before) == 1
    return graphs


class MLPHalf(nn.Module):
    """The second half of a transformer layer: norm, gated MLP, residual sum."""

    def __init__(self, hidden: int, ffn: int, **settings: Any) -> None:
        super().__init__()
        gated = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
        sizes = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": TP}
        cfg = config(**sizes, bias_activation_fusion=False, **gated, **settings)
        self.pre_mlp_layernorm = FrozenRMSNorm(cfg, hidden).to(cfg.params_dtype)
        self.mlp = MLP(cfg, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0]


def mlp_half(hidden: int, ffn: int, tokens: int, dim: int, **settings: Any) -> LayerGraphs:
    """Graphs of an MLP at TP 2 + SP."""
    dora = dora_fx.DoRA(["linear_fc1", "linear_fc2"], dim=dim)
    model = dora(MLPHalf(hidden, ffn, **PARALLEL, **settings))
    dtype = settings.get("params_dtype", torch.float32)
    return graphs_of(model, torch.randn(tokens // TP, BATCH, hidden, dtype=dtype, requires_grad=True))


def transformer_layer() -> nn.Module:
    """A whole transformer layer of the local spec at TP 2 + SP."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = FrozenRMSNorm
    layer = build_module(spec, config=config(**GPT_SHAPE, **PARALLEL), layer_number=1)
    return dora_fx.DoRA([f"*{target}" for target in GPT_TARGETS], dim=4)(layer)


def layer_arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of the rank's tokens, mask and rotary angles."""
    hidden = torch.randn(SEQUENCE // TP, BATCH, GPT_SHAPE["hidden_size"], requires_grad=True)
    future = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    return hidden, future, torch.randn(SEQUENCE, 1, 1, 8)


def whole_layer(*, recompute: bool = False) -> LayerGraphs:
    layer = transformer_layer()

    def run(hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        return layer(hidden_states, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)[0]

    function = (lambda *args: checkpoint(run, *args, use_reentrant=False)) if recompute else run
    return graphs_of(function, *layer_arguments())


def one_linear(linear: Callable[..., nn.Module], features: int, tokens: int, **settings: Any) -> LayerGraphs:
    """Graphs of one adapted layer; `dropout` and `complete_gradients` go to the adapter."""
    of_adapter = {name: settings.pop(name) for name in ("dropout", "complete_gradients") if name in settings}
    model = adapted(linear(tensor_model_parallel_size=TP, **settings), **of_adapter)
    return graphs_of(model, torch.randn(tokens, BATCH, features, requires_grad=True))


def row_in_inference() -> LayerGraphs:
    """Without gradients Megatron's collectives are ops of the graph itself, which write into a buffer of its own."""
    with torch.no_grad():
        return one_linear(row, IN // TP, SEQUENCE, sequence_parallel=True)


def plain_linear() -> LayerGraphs:
    """Graphs of an `nn.Linear` with dropout, which is whole on every rank."""
    model = adapted(nn.Linear(IN, 80), dropout=0.5)
    return graphs_of(model, torch.randn(SEQUENCE, BATCH, IN, requires_grad=True))


LAYERS: dict[str, Callable[[], LayerGraphs]] = {
    "column": lambda: one_linear(column, IN, SEQUENCE),
    "row_sequence_parallel": lambda: one_linear(row, IN // TP, SEQUENCE, sequence_parallel=True),
    "row_with_dropout": lambda: one_linear(row, IN // TP, SEQUENCE, dropout=0.5, bias=True, skip_bias_add=False),
    "column_completed_once": lambda: one_linear(column, IN, SEQUENCE, complete_gradients="once_per_step"),
    "row_in_inference": row_in_inference,
    "plain_linear": plain_linear,
    "mlp_half": lambda: mlp_half(48, 80, SEQUENCE, 8),
    "whole_layer": whole_layer,
    "whole_layer_recomputed": lambda: whole_layer(recompute=True),
}


@contextmanager
def layer_graphs(name: str) -> Iterator[LayerGraphs]:
    """The graphs of one of `LAYERS`, in the world that they were captured in."""
    with fake_world(TP):
        yield LAYERS[name]()
