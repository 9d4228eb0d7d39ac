"""Whenever gradients are completed, they are those of one rank, with all that Megatron does to gradients."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.oracle import run_oracle
from tests.distributed.test_same_function_everywhere import bound_of, error_of
from tests.distributed.training import TRAINED, Mode, TrainingRun
from tests.distributed.zoo import Topology, layer_names, sites_of

ALL_LAYERS: tuple[str, ...] = ()
SOME = ("column_bias_added", "row_bias_added", "gated_mlp", "output_layer")

# Where nothing else is said they are completed once per step, as Megatron's wrapper is there.
EAGER = Mode(complete_gradients="once_per_step")
IN_EACH_PASS = Mode(complete_gradients="every_backward", overlap_grad_reduce=True, num_steps=3)
IN_EACH_PASS_COMPILED = replace(IN_EACH_PASS, compiler="dora_fx_aot_eager", dropout=0.3)
OVERLAPPED = replace(EAGER, overlap_grad_reduce=True)
# Clipping measures the norm of gradients that must be complete by then.
CLIPPED = replace(OVERLAPPED, dtype=torch.float32, clip_grad=1.0, num_steps=3)
COMPILED = replace(OVERLAPPED, compiler="dora_fx_aot_eager", dropout=0.3, recompute=True, num_steps=3)
# Data-parallel ranks draw masks for their own sequences, which one rank does not.
WITHOUT_DROPOUT = replace(COMPILED, dropout=0.0)
DISTRIBUTED = replace(OVERLAPPED, distributed_optimizer=True, dtype=torch.float32)
DISTRIBUTED_COMPILED = replace(DISTRIBUTED, compiler="dora_fx_aot_eager", overlap_grad_reduce=False, clip_grad=1.0)
BFLOAT16 = replace(OVERLAPPED, dtype=torch.bfloat16)
INDUCTOR = replace(OVERLAPPED, compiler="dora_fx_inductor", dtype=torch.float32)
# Another compiler has no leaves in its graphs, and completes gradients in each backward pass.
PLAIN_INDUCTOR = replace(OVERLAPPED, compiler="inductor", num_steps=3)


def short(mode: Mode) -> Mode:
    return replace(mode, num_steps=3)


slow = pytest.mark.slow
SP = Topology(tp=2, sequence_parallel=True)
SP_DP = replace(SP, dp=2)
CASES = [
    pytest.param(Topology(tp=2), ALL_LAYERS, [short(EAGER), COMPILED, IN_EACH_PASS], id="tp2"),
    pytest.param(SP, ALL_LAYERS, [CLIPPED, short(DISTRIBUTED), IN_EACH_PASS_COMPILED], id="tp2-sp"),
    pytest.param(Topology(tp=2), SOME, [short(INDUCTOR), PLAIN_INDUCTOR, BFLOAT16], marks=slow, id="tp2-compilers"),
    pytest.param(
        Topology(tp=2, dp=2), SOME, [CLIPPED, DISTRIBUTED, short(DISTRIBUTED_COMPILED)], marks=slow, id="tp2-dp2"
    ),
    pytest.param(SP_DP, SOME, [OVERLAPPED, WITHOUT_DROPOUT, short(DISTRIBUTED)], marks=slow, id="tp2-sp-dp2"),
    pytest.param(Topology(tp=4), SOME, [EAGER, CLIPPED], marks=slow, id="tp4"),
    pytest.param(Topology(tp=4, sequence_parallel=True), SOME, [OVERLAPPED, COMPILED], marks=slow, id="tp4-sp"),
]


def wrong_quantities(mode: Mode, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Name -> error of what differs from one rank's."""
    if mode.distributed_optimizer:
        # A rank has its own part of the buffer of gradients.
        expected = {q: value for q, value in expected.items() if not q.endswith(tuple(f" d{name}" for name in TRAINED))}
    wrong = []
    for quantity, value in expected.items():
        error = error_of(found[quantity], value, mode.dtype)
        if not error <= bound_of(quantity, mode.dtype) and quantity != "replicas differ by":
            wrong.append(f"{mode}: {quantity} off by {error:.1e}, bound {bound_of(quantity, mode.dtype):.0e}")
    return wrong


def run_modes(topology: Topology, modes: list[Mode], names: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    return [TrainingRun(topology, mode, names).results() for mode in modes]


@pytest.mark.parametrize(("topology", "names", "modes"), CASES)
def test_equals_one_rank(topology, names, modes):
    names = names or tuple(layer_names(topology))
    oracle = run_ranks(run_oracle, 1, 1, [(mode, names) for mode in modes])
    found = run_ranks(run_modes, topology.world_size, topology.tp, topology, modes, names)
    wrong = []
    for mode, expected, results in zip(modes, oracle, found, strict=True):
        assert float(results["replicas differ by"]) == 0.0
        wrong += wrong_quantities(mode, expected, results)
    assert not wrong, "\n".join(wrong)


def gradients_after_the_wrapper(topology: Topology, mode: Mode, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Gradients of a backward pass of a model that was trained in Megatron's wrapper before."""
    run = TrainingRun(topology, mode, names)
    run.forward_backward(0, keep=False)
    wrapper = weakref.ref(run.ddp)
    del run.ddp, run.optimizer
    gc.collect()
    assert wrapper() is None
    run.forward_backward(0, keep=False)
    return {
        f"{path} {name}": parameter.grad
        for path, site in sites_of(run.zoo).items()
        for name, parameter in site.adapter.named_parameters()
    }


@pytest.mark.parametrize("compiler", ["eager", "dora_fx_aot_eager"])
def test_a_graph_that_outlives_the_wrapper_completes_gradients_as_they_come(compiler):
    found, expected = (
        run_ranks(gradients_after_the_wrapper, 2, 2, SP, Mode(compiler=compiler, complete_gradients=when), SOME)
        for when in ("auto", "every_backward")
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
