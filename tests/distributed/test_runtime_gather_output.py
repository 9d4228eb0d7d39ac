"""A column layer that is told at the call whether to gather its output, on two ranks, as the one-rank oracle."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from tests.closeness import relative_error
from tests.distributed.launch import run_ranks
from tests.distributed.training import TRAINED
from tests.distributed.zoo import (
    BATCH,
    HIDDEN,
    SEQUENCE,
    Sharding,
    Topology,
    Zoo,
    gather,
    set_adapter_values,
    shardings,
    split,
    tensors_of,
    tp_rank,
    whole_values,
)
from tests.reference import ReferenceLinear
from tests.tables import every_case

TOPOLOGY = Topology(tp=2)
KINDS = ("column_bias_added", "column_gather_output")
COMPILERS = (None, "eager", "aot_eager")
CASES = list(product(KINDS, COMPILERS, (None, True, False)))


def oracle(site: Any, group: Any, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of the whole layer on one rank."""
    rules = shardings("", site.to_wrap)
    wholes = {name: gather(tensor, rules[name], group) for name, tensor in tensors_of(site).items()}
    bias = gather(site.to_wrap.bias, rules["bias"], group)
    trained = [wholes[name] for name in TRAINED]
    layer = ReferenceLinear(wholes["weight"], bias, *trained, scaling=site.scaling)
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    assert x.grad is not None
    return {"y": y, "dx": x.grad, **{f"d{name}": getattr(layer, name).grad for name in TRAINED}}


def errors(kind: str, compiler: str | None, gathers: bool | None) -> dict[str, float]:
    """Relative errors of the whole output and all gradients; each rank's loss is of what it holds."""
    torch._dynamo.reset()
    group = parallel_state.get_tensor_model_parallel_group()
    zoo = Zoo(TOPOLOGY, torch.float64, 0.0, [kind])
    set_adapter_values(zoo, TOPOLOGY)
    site: Any = zoo.layers[kind]
    call = partial(site, runtime_gather_output=gathers)
    if compiler is not None:
        call = torch.compile(call, backend="dora_fx", options={"inner_compiler": compiler}, fullgraph=True)
    is_whole = site.to_wrap.gather_output if gathers is None else gathers
    sharding = Sharding(None if is_whole else 2)
    x = whole_values((SEQUENCE, BATCH, HIDDEN), f"{kind}.x", 1.0).requires_grad_()
    y, returned_bias = call(x)
    assert returned_bias is None
    weights = whole_values((SEQUENCE, BATCH, site.to_wrap.output_size), f"{kind}.loss", 1.0)
    (y * split(weights, sharding.dim, tp_rank(), TOPOLOGY.tp)).sum().backward()
    assert x.grad is not None
    rules = shardings("", site.to_wrap)
    found = {"y": gather(y, sharding, group), "dx": x.grad}
    found |= {f"d{name}": gather(tensors_of(site)[name].grad, rules[name], group) for name in TRAINED}
    expected = oracle(site, group, x.detach(), weights)
    assert found["y"].shape == expected["y"].shape
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def all_errors() -> list[dict[str, float]]:
    return [errors(*case) for case in CASES]


@pytest.fixture(scope="module")
def found() -> list[dict[str, float]]:
    return run_ranks(all_errors, TOPOLOGY.world_size, TOPOLOGY.tp)


@every_case("case", CASES, ids=str)
def test_the_call_decides_and_the_function_stays(case, found):
    assert found[CASES.index(case)]
    assert {name: error for name, error in found[CASES.index(case)].items() if not error <= 1e-12} == {}
