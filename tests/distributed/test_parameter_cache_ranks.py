"""Norms and gathered factors are never read stale under Megatron's optimizers, on real ranks.

What is cached is compared bit by bit at each call with what the parameters give ("checked"), and the trained
parameters with those of a run that works everything out at each call. Megatron's mixed-precision and distributed
optimizers write parameters where neither memory nor version tells, so a fault that hides their steps must be caught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

import dora_fx
from dora_fx import parameter_cache
from dora_fx.cpu_runtime import cuda_means_cpu
from dora_fx.parameter_cache import StaleParametersError
from tests.distributed.launch import run_ranks
from tests.distributed.mutations import Mutation, planted
from tests.distributed.zoo import BATCH, LAYERS, SEQUENCE, Topology, Zoo, make_config, set_adapter_values, whole_values

NAMES = ("gated_mlp", "row_split_input")
NUM_STEPS, NUM_MICROBATCHES = 2, 8
NO_STEP_IS_COUNTED = Mutation("stale norm", parameter_cache._constants, "num_optimizer_steps()", "0")


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
        with planted(NO_STEP_IS_COUNTED), pytest.raises(StaleParametersError):
            run("checked", lambda zoo: None)


def prove_all(topology: Topology, cases: list[tuple[torch.dtype, bool, bool]]) -> int:
    for case in cases:
        prove(topology, *case)
    return len(cases)


@pytest.mark.parametrize(
    ("topology", "cases"),
    [
        (Topology(tp=2), [(torch.float32, False, False), (torch.bfloat16, False, True)]),
        (Topology(dp=2), [(torch.float32, True, True), (torch.bfloat16, True, True)]),
    ],
    ids=["tensor-parallel", "distributed-optimizer"],
)
def test_trained_as_if_worked_out_at_each_call(topology, cases):
    assert run_ranks(prove_all, topology.world_size, topology.tp, topology, cases) == len(cases)


def attach_under_an_overlapping_gather() -> str:
    zoo = Zoo(Topology(dp=2), torch.float32, 0.0, NAMES)
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True)
    with cuda_means_cpu(), pytest.raises(ValueError, match="overlap_param_gather=True, expected False") as adapted:
        DistributedDataParallel(make_config(zoo.topology, torch.float32), config, zoo)
    return str(adapted.value)


def test_a_parameter_gather_that_overlaps_the_forward_pass_is_refused():
    assert "layers.gated_mlp.linear_fc1" in run_ranks(attach_under_an_overlapping_gather, 2, 1)
