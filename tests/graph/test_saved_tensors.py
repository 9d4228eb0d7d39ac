"""What a DoRA layer keeps for its backward pass, beside the same layer with LoRA, by name and bytes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from benchmarks.variants import with_dora, with_lora
from dora_fx import DoRA
from dora_fx.passes import default_passes
from dora_fx.passes.pipeline import run_passes
from tests.graph.sites import config

HIDDEN, FFN, DIM, SEQUENCE, BATCH = 48, 80, 8, 6, 2
TP = 2
TOKENS = SEQUENCE * BATCH


class Residual(nn.Module):
    """A gated MLP in a residual stream, as in a transformer layer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        gated = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
        cfg = config(ffn_hidden_size=FFN, bias_activation_fusion=False, **gated, **settings)
        self.mlp = MLP(cfg, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)[0]


def saved_activations(model: Callable[..., torch.Tensor], sequence: int = SEQUENCE) -> Counter[tuple[int, ...]]:
    """Shapes of the floating-point tensors that the forward graph hands to the backward graph, without its inputs."""
    saved: Counter[tuple[int, ...]] = Counter()

    def note(gm: fx.GraphModule, example_inputs: Any) -> Any:
        [outputs] = gm.graph.find_nodes(op="output")[0].args
        for node in outputs[1:]:
            is_float = node.meta["val"].is_floating_point()
            if is_float and node.op != "placeholder" and not _is_view_of_input(node):
                saved[tuple(node.meta["val"].shape)] += 1
        return make_boxed_func(gm)

    aot = aot_autograd(
        fw_compiler=note,
        bw_compiler=lambda gm, _: make_boxed_func(gm),
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        return aot(run_passes(gm, example_inputs, default_passes()), example_inputs)

    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(sequence, BATCH, HIDDEN, requires_grad=True))
    torch._dynamo.reset()
    return saved


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.split_with_sizes.default,
    operator.getitem,
}


def _is_view_of_input(node: fx.Node) -> bool:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def num_saved(attach: Callable[..., nn.Module], *, recompute: bool) -> int:
    """How many numbers an adapted layer keeps."""
    model = attach(Residual(), DIM, ["linear_fc1", "linear_fc2"])
    saved = saved_activations((lambda x: checkpoint(model, x, use_reentrant=False)) if recompute else model)
    print(attach.__name__, "with recomputation" if recompute else "", dict(saved))
    return sum(torch.Size(shape).numel() * count for shape, count in saved.items())


def test_one_output_of_the_row_layer_and_no_more(tensor_parallel):
    tensor_parallel(1)
    assert num_saved(with_dora, recompute=False) == num_saved(with_lora, recompute=False) + TOKENS * HIDDEN


def test_nothing_under_recomputation(tensor_parallel):
    tensor_parallel(1)
    assert num_saved(with_dora, recompute=True) == num_saved(with_lora, recompute=True)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_nothing_of_the_gathered_input_under_sequence_parallelism(tensor_parallel, dropout):
    tensor_parallel(TP)
    model = Residual(tensor_model_parallel_size=TP, sequence_parallel=True)
    # Under dropout a row layer keeps W0 d(x), which has as many elements here as the gathered input of fc1.
    DoRA(["linear_fc1"], dim=DIM, dropout=dropout)(model)
    own = SEQUENCE // TP
    compiled = saved_activations(model, own)
    eager = saved_by_autograd(model, torch.randn(own, BATCH, HIDDEN, requires_grad=True))
    print("compiled", dict(compiled), "eager", dict(eager))
    for saved in (compiled, eager):
        # By their numbers of elements, since some are views. No other tensor of the layer has as many.
        sizes = {torch.Size(shape).numel() for shape in saved}
        assert TOKENS * HIDDEN not in sizes
        assert TOKENS * DIM in sizes


def saved_by_autograd(model: Callable[..., torch.Tensor], x: torch.Tensor) -> Counter[tuple[int, ...]]:
    """Shapes of the floating-point tensors that eager code keeps for its backward pass."""
    saved: Counter[tuple[int, ...]] = Counter()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.dim() > 1:
            saved[tuple(tensor.shape)] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return saved
