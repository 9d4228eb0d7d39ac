"""Norms and gathered factors are never read stale under Megatron's optimizers, on real ranks.

What is cached is compared bit by bit at each call with what the parameters give ("checked"), and the trained
parameters with those of a run that computes everything at each call. Megatron's mixed-precision and distributed
optimizers write parameters where neither memory nor version tells, so a fault that hides their steps and what they
wrote must be caught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch.multiprocessing import ProcessRaisedException

import dora_fx
from dora_fx.cache import step_counts
from dora_fx.cache.freshness import StaleParametersError
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.distributed.launch import run_ranks
from tests.distributed.mutations import BITS_ARE_NOT_COMPARED, Mutation, planted
from tests.distributed.zoo import (
    BATCH,
    FFN,
    HIDDEN,
    LAYERS,
    SEQUENCE,
    Topology,
    Zoo,
    make_config,
    set_adapter_values,
    sites_of,
    whole_values,
)

NAMES = ("gated_mlp", "row_split_input")
NUM_STEPS, NUM_MICROBATCHES = 2, 8
NO_STEP_IS_COUNTED = Mutation("stale norm", step_counts._count_step, "_all_steps.steps += 1", "_all_steps.steps += 0")


def train(
    topology: Topology, dtype: torch.dtype, distributed_optimizer: bool, weight_norm: str, prepare: Callable[[Any], Any]
) -> list[torch.Tensor]:
    """The adapters' parameters on this rank after a few steps; `prepare` is called before each micro-batch."""
    torch._dynamo.reset()
    zoo = Zoo(topology, dtype, 0.0, NAMES)
    set_adapter_values(zoo, topology)
    with cuda_means_cpu():
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
        ddp = DistributedDataParallel(make_config(topology, dtype), ddp_config, zoo)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=1.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=distributed_optimizer,
        )
        optimizer = get_megatron_optimizer(settings, [ddp])
    options = {"inner_compiler": "aot_eager", "weight_norm": weight_norm}
    run = torch.compile(zoo, backend="dora_fx", options=options, fullgraph=True)
    for _ in range(NUM_STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        for micro_batch in range(NUM_MICROBATCHES):
            prepare(zoo)
            x = {name: whole_values((SEQUENCE, BATCH, LAYERS[name][0]), f"{name} {micro_batch}", 1.0) for name in NAMES}
            outputs = run({name: values.to(dtype) for name, values in x.items()})
            sum(output.float().square().mean() for output in outputs.values()).backward()
        with cuda_means_cpu():
            finalize_model_grads([ddp])
            optimizer.step()
    return [parameter.detach().clone() for parameter in zoo.parameters() if parameter.requires_grad]


def prove(topology: Topology, dtype: torch.dtype, distributed_optimizer: bool, hides_its_steps: bool) -> None:
    def run(*settings: Any) -> list[torch.Tensor]:
        return train(topology, dtype, distributed_optimizer, *settings)

    cached = run("checked", lambda zoo: None)
    always = run("once_per_step", dora_fx.invalidate_norms)
    assert len(cached) == len(always) > 0
    assert all(map(torch.equal, cached, always))
    if hides_its_steps:
        for fault in (NO_STEP_IS_COUNTED, BITS_ARE_NOT_COMPARED):
            # One of the two is enough.
            with planted(fault):
                assert all(map(torch.equal, run("checked", lambda zoo: None), always))
        with planted(NO_STEP_IS_COUNTED), planted(BITS_ARE_NOT_COMPARED), pytest.raises(StaleParametersError):
            run("checked", lambda zoo: None)


def prove_all(topology: Topology, cases: list[tuple[torch.dtype, bool, bool]]) -> int:
    for case in cases:
        prove(topology, *case)
    return len(cases)


@pytest.mark.parametrize(
    ("topology", "cases"),
    [
        (Topology(tp=2), [(torch.float32, False, False), (torch.bfloat16, False, False)]),
        (Topology(dp=2), [(torch.float32, True, True), (torch.bfloat16, True, True)]),
    ],
    ids=["tensor-parallel", "distributed-optimizer"],
)
def test_trained_as_if_computed_at_each_call(topology, cases):
    assert run_ranks(prove_all, topology.world_size, topology.tp, topology, cases) == len(cases)


def on_rank_0(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda zoo: change(zoo) if dist.get_rank() == 0 else None


def load_own_values(zoo: Zoo) -> None:
    zoo.load_state_dict({key: None if value is None else value.clone() for key, value in zoo.state_dict().items()})


@torch.no_grad()
def write_past_the_counter(zoo: Zoo) -> None:
    for parameter in zoo.parameters():
        parameter.data.mul_(0.75)


@torch.no_grad()
def double_the_base(zoo: Zoo) -> None:
    for site in sites_of(zoo).values():
        site.weight.mul_(2.0)


ONE_RANK_ALONE = [lambda zoo: zoo.to("cpu"), load_own_values, lambda zoo: zoo.load_state_dict(zoo.state_dict())]
EVERY_RANK = [write_past_the_counter, double_the_base, dora_fx.invalidate_norms, lambda zoo: zoo.float().double()]


def change_and_compare() -> float:
    """Largest difference, relative to the output, from what eager code computes after each change."""
    topology = Topology(tp=2, sequence_parallel=True)
    zoo = Zoo(topology, torch.float64, 0.0, ("gated_mlp", "row_bias_added"))
    set_adapter_values(zoo, topology)
    run = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "aot_eager", "rank_timeout": 20.0})
    torch.manual_seed(7)
    inputs = {"gated_mlp": torch.randn(4, 2, HIDDEN).double(), "row_bias_added": torch.randn(8, 2, FFN // 2).double()}
    worst = 0.0
    for change in (lambda zoo: None, *map(on_rank_0, ONE_RANK_ALONE), *EVERY_RANK):
        change(zoo)
        expected = zoo(inputs)
        for name, output in run(inputs).items():
            worst = max(worst, float((output - expected[name]).abs().max() / expected[name].abs().max()))
    return worst


def test_ranks_may_move_and_load_alone_and_must_write_together():
    # Sums of some hundred float64 terms, in another order.
    assert run_ranks(change_and_compare, 2, 2) <= 1e-12


def write_on_one_rank() -> None:
    topology = Topology(tp=2)
    zoo = Zoo(topology, torch.float64, 0.0, ("gated_mlp",))
    run = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "eager", "rank_timeout": 2.0})
    inputs = {"gated_mlp": torch.randn(8, 2, HIDDEN).double()}
    run(inputs)
    on_rank_0(write_past_the_counter)(zoo)
    run(inputs)


def test_a_write_on_one_rank_is_an_error_and_no_hang():
    message = r"gated_mlp.linear_fc1: parameters of 2 layers .* rank 0 outside .* ranks \[1\] found no change .* 2 s"
    with pytest.raises(ProcessRaisedException, match=message):
        run_ranks(write_on_one_rank, 2, 2)


def attach_under_an_overlapping_gather() -> str:
    zoo = Zoo(Topology(dp=2), torch.float32, 0.0, NAMES)
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True)
    with cuda_means_cpu(), pytest.raises(ValueError, match="overlap_param_gather=True, expected False") as adapted:
        DistributedDataParallel(make_config(zoo.topology, torch.float32), config, zoo)
    return str(adapted.value)


def test_a_parameter_gather_that_overlaps_the_forward_pass_is_refused():
    assert "layers.gated_mlp.linear_fc1" in run_ranks(attach_under_an_overlapping_gather, 2, 1)
