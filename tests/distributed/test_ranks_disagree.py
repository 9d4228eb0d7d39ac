"""Ranks that differ from one another, or die, end the run with an error that says so; none hangs."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import nn

import dora_fx
from dora_fx.backend import dora_fx as dora_fx_backend
from tests.distributed.launch import enter_rank, run_ranks
from tests.distributed.zoo import FFN, HIDDEN, Topology, make_config
from tests.processes import start_process


def row_model(dim: int = 4) -> nn.Module:
    config = make_config(Topology(tp=2), torch.float32)
    linear = RowParallelLinear(
        FFN,
        HIDDEN,
        config=config,
        init_method=nn.init.normal_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    return dora_fx.DoRA(["linear"], dim=dim)(nn.ModuleDict({"linear": linear}))["linear"]


def attach_with_another_dim() -> None:
    row_model(dim=4 + 4 * dist.get_rank())


def attach_under_another_seed() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    shard = row_model().adapter.linear_in.weight.detach()
    parts = [torch.empty_like(shard) for _ in range(2)]
    dist.all_gather(parts, shard)
    torch.manual_seed(0)
    row_model()
    return torch.cat(parts, 1), shard


def load_a_shard_of_another_shape() -> None:
    model = row_model()
    if dist.get_rank() == 1:
        model.adapter.linear_out.weight.data = torch.zeros(HIDDEN, 4)
    model(torch.randn(3, 1, FFN // 2))


def load_a_magnitude_of_another_shape() -> None:
    model = row_model()
    if dist.get_rank() == 1:
        model.adapter.weight_magnitude.data = torch.ones(HIDDEN // 2)
    model(torch.randn(3, 1, FFN // 2))


def recompile_on_one_rank() -> None:
    model = row_model()
    timeouts = iter((300.0, 2.0))

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        # Both ranks may be slow to compile the first graph; only one compiles the second.
        options = {"inner_compiler": "eager", "rank_timeout": next(timeouts)}
        return dora_fx_backend(gm, example_inputs, options=options)

    compiled = torch.compile(model, backend=backend, dynamic=False)
    for tokens in (3, 3 + dist.get_rank()):
        compiled(torch.randn(tokens, 1, FFN // 2))


def compile_another_graph() -> None:
    model = row_model()
    model.adapter.dropout = 0.1 * dist.get_rank()
    torch.compile(model, backend="dora_fx", options={"inner_compiler": "eager"})(torch.randn(3, 1, FFN // 2))


def die_in_the_second_step() -> None:
    model = row_model()
    for step in range(2):
        if (dist.get_rank(), step) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.randn(3, 1, FFN // 2))[0].sum().backward()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (attach_with_another_dim, r"DoRA.dim: found 8 on tensor-parallel rank 1 and 4 on rank 0"),
        (
            load_a_shard_of_another_shape,
            r"linear_out: found a shard of shape \(32, 4\), expected \(16, 4\)",
        ),
        (
            load_a_magnitude_of_another_shape,
            r"weight_magnitude: found shape \(16,\) on cpu, expected \(32,\) on",
        ),
        (recompile_on_one_rank, r"rank 1 compiles graph 2 .*\(4, 1, 24\).* ranks \[0\] did not follow within 2 s"),
        (compile_another_graph, r"tensor-parallel ranks [01] and [01] compile different graphs"),
    ],
)
def test_a_rank_that_differs_is_named(function, message):
    with pytest.raises(mp.ProcessRaisedException, match=message):
        run_ranks(function, 2, 2)


def test_all_ranks_draw_from_the_seed_of_the_first():
    whole, own = run_ranks(attach_under_another_seed, 2, 2)
    torch.manual_seed(0)
    assert torch.equal(whole[:, : FFN // 2], own)
    assert not torch.equal(whole[:, : FFN // 2], whole[:, FFN // 2 :])


def test_a_killed_rank_ends_the_others():
    with tempfile.TemporaryDirectory() as folder:
        ranks = [start_process(enter_rank, rank, folder, die_in_the_second_step, 2, 2, ()) for rank in (0, 1)]
        for rank in ranks:
            rank.join(timeout=120)
        assert ranks[1].exitcode == -signal.SIGKILL
        assert ranks[0].exitcode == 1
        assert not (Path(folder) / "result").exists()
