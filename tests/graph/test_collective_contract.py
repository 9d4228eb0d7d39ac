"""DoRA adds no collective of tokens x features to the frozen base, in any layout, forward or backward.

The forward pass adds none at all: what it needs of other ranks is fetched once per optimizer step. The backward pass
adds none either where gradients are completed once per step: its messages follow the last one. Sequence-parallel column
layers alone send the low-rank product of their tokens, `[tokens, dim]`, and its gradient, so that they need not keep
their gathered input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import nn

import dora_fx
from benchmarks.collective_counts import CollectiveCounts, count_collectives
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.graph.sites import DIM, IN, OUT, OneLinear, adapted, column, config, row

TP, SEQUENCE, BATCH = 4, 8, 3
TOKENS = SEQUENCE * BATCH
FLOAT = 4

# What each layout may add, as placement.py says: (kind, bytes) -> count; all of it is weight-sized. The first three
# are sent once per optimizer step, the others in each backward pass.
LORA_A = {("all_gather", DIM * IN * FLOAT): 1}
LORA_B = {("all_gather", OUT * DIM * FLOAT): 1}
NORM = {("all_reduce", (OUT + DIM * DIM) * FLOAT): 1}
MAGNITUDE_GRAD = {("all_reduce", OUT * FLOAT): 1}
LORA_A_GRAD = {("reduce_scatter", DIM * IN * FLOAT): 1}
LORA_B_GRAD = {("reduce_scatter", OUT * DIM * FLOAT): 1}
# In each forward and each backward pass of sequence-parallel column layers.
LOW_RANK_SIZE = TOKENS * DIM * FLOAT

CASES = {
    "column": (column, {}, (SEQUENCE, IN), LORA_A, LORA_A_GRAD),
    "column_sequence_parallel": (column, {"sequence_parallel": True}, (SEQUENCE // TP, IN), LORA_A, LORA_A_GRAD),
    "column_gather_output": (column, {"gather_output": True}, (SEQUENCE, IN), LORA_A, LORA_A_GRAD),
    "column_sequence_parallel_gather_output": (
        column,
        {"sequence_parallel": True, "gather_output": True},
        (SEQUENCE // TP, IN),
        LORA_A,
        LORA_A_GRAD,
    ),
    "row": (row, {}, (SEQUENCE, IN // TP), LORA_B | NORM, LORA_B_GRAD),
    "row_sequence_parallel": (
        row,
        {"sequence_parallel": True},
        (SEQUENCE, IN // TP),
        LORA_B | NORM,
        LORA_B_GRAD | MAGNITUDE_GRAD,
    ),
    "row_split_input": (row, {"input_is_parallel": False}, (SEQUENCE, IN), LORA_B | NORM, LORA_B_GRAD),
}


def compiled_counts(model: nn.Module, x: torch.Tensor, **settings: Any) -> CollectiveCounts:
    torch._dynamo.reset()
    options = {"inner_compiler": "aot_eager"}
    return count_collectives(torch.compile(model, backend="dora_fx", options=options, fullgraph=True), x, **settings)


def counts_of_a_step(count: Callable[..., CollectiveCounts], model: nn.Module, x: torch.Tensor) -> CollectiveCounts:
    """Count with Megatron's data parallelism around the model, over one replica."""
    ddp = DistributedDataParallel(config(), DistributedDataParallelConfig(), model)

    def finish() -> None:
        with cuda_means_cpu():
            ddp.finish_grad_sync()

    return count(model, x, finish=finish)


# Compiled code with and without dropout only for the row-parallel layer, where dropout adds a collective; where it adds
# none, either is met with some layer.
COMPILED = {
    ("column", 0.5),
    ("column_sequence_parallel", 0.0),
    ("column_gather_output", 0.5),
    ("column_sequence_parallel_gather_output", 0.5),
    ("row", 0.0),
    ("row", 0.5),
    ("row_sequence_parallel", 0.0),
    ("row_split_input", 0.5),
}


@pytest.mark.parametrize(
    ("count", "dropout", "name"),
    [
        (count, dropout, name)
        for name, dropout in product(CASES, [0.0, 0.5])
        for count in (compiled_counts, count_collectives)
        if count is count_collectives or (name, dropout) in COMPILED
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_collectives_added_to_the_base(tensor_parallel, name, dropout, count):
    layer, settings, (sequence, features), once_per_step, backward = CASES[name]
    tensor_parallel(TP)
    settings = settings | {"tensor_model_parallel_size": TP}

    def counts(wrap):
        x = torch.randn(sequence, BATCH, features, requires_grad=True)
        return count(wrap(layer(**settings)), x)

    base = counts(lambda linear: OneLinear(linear).requires_grad_(False))
    added = counts(lambda linear: adapted(linear, dropout=dropout)) - base
    removed = base - counts(lambda linear: adapted(linear, dropout=dropout))
    if dropout and name in ("row", "row_split_input"):
        backward = backward | MAGNITUDE_GRAD
    gathers_tokens = name.startswith("column_sequence_parallel")
    gathered = {("all_gather", LOW_RANK_SIZE): 1} if gathers_tokens else {}
    scattered = {("reduce_scatter", LOW_RANK_SIZE): 1} if gathers_tokens else {}
    assert dict(added.once_per_step) == once_per_step
    assert dict(added.forward) == gathered
    assert dict(added.backward) == backward | scattered
    assert not removed.forward and not removed.backward
    activations = [TOKENS * width * FLOAT for width in (IN, OUT)]
    assert all(size not in activations for _, size in added.once_per_step | added.forward | added.backward)

    def once(linear):
        return adapted(linear, dropout=dropout, complete_gradients="once_per_step")

    x = torch.randn(sequence, BATCH, features, requires_grad=True)
    completed_once = counts_of_a_step(count, once(layer(**settings)), x) - base
    assert dict(completed_once.once_per_step) == once_per_step | backward
    assert (dict(completed_once.forward), dict(completed_once.backward)) == (gathered, scattered)


class Chain(nn.ModuleList):
    """MLPs one after another."""

    def forward(self, x):
        for mlp in self:
            x, _ = mlp(x)
        return x


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_of_one_graph_share_their_weight_sized_collectives(tensor_parallel, sequence_parallel):
    tensor_parallel(TP)
    cfg = config(tensor_model_parallel_size=TP, sequence_parallel=sequence_parallel, add_bias_linear=False)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    tokens = SEQUENCE // TP if sequence_parallel else SEQUENCE

    def counts(wrap, count=compiled_counts):
        model = wrap(Chain(MLP(cfg, submodules) for _ in range(2)))
        return count(model, torch.randn(tokens, BATCH, IN, requires_grad=True))

    base = counts(lambda mlps: mlps.requires_grad_(False))
    added = counts(dora_fx.DoRA(["linear_fc1", "linear_fc2"], dim=DIM)) - base
    factors = 2 * (DIM * IN + IN * DIM) * FLOAT
    magnitude_grad = {("all_reduce", 2 * IN * FLOAT): 1} if sequence_parallel else {}
    # One of each column layer, which is not known before the layers in front of it are computed.
    gathered = {("all_gather", LOW_RANK_SIZE): 2} if sequence_parallel else {}
    scattered = {("reduce_scatter", LOW_RANK_SIZE): 2} if sequence_parallel else {}
    assert dict(added.forward) == gathered
    assert dict(added.once_per_step) == {("all_gather", factors): 1, ("all_reduce", 2 * (IN + DIM * DIM) * FLOAT): 1}
    of_weights = {("reduce_scatter", factors): 1} | magnitude_grad
    assert dict(added.backward) == of_weights | scattered

    once = counts(
        dora_fx.DoRA(["linear_fc1", "linear_fc2"], dim=DIM, complete_gradients="once_per_step"),
        partial(counts_of_a_step, compiled_counts),
    )
    assert (once - base).once_per_step == added.once_per_step + Counter(of_weights)
    assert (dict((once - base).forward), dict((once - base).backward)) == (gathered, scattered)
