"""Merging on tensor-parallel ranks: local per shard, the oracle's weights, the adapted model's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

import dora_fx
from tests.closeness import note_margin, relative_error, rounding
from tests.distributed.launch import run_ranks
from tests.distributed.training import input_sharding, output_sharding
from tests.distributed.zoo import (
    BATCH,
    DIM,
    FFN,
    LAYERS,
    SEQUENCE,
    Topology,
    Zoo,
    gather,
    layer_names,
    set_adapter_values,
    shardings,
    sites_of,
    split,
    tensors_of,
    tp_rank,
    whole_values,
)
from tests.reference import row_norms
from tests.tables import every_case

TOPOLOGIES = [Topology(tp=2), Topology(tp=2, sequence_parallel=True)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Of a whole layer's output against the adapted layer's, which rounds elsewhere. The longest way to a result is the
# transformer layer's: four linears and two norms. A bfloat16 layer rounds what they return and keeps sums in float32.
OUTPUT_TOLERANCE = {
    torch.float32: rounding(torch.float32, 6 * (FFN + DIM)),
    torch.float64: rounding(torch.float64, 6 * (FFN + DIM)),
    torch.bfloat16: rounding(torch.bfloat16, 6),
}
# Of the merged weight against the oracle's. In bfloat16 it is float32's, rounded once: by half a unit at most.
WEIGHT_TOLERANCE = {dtype: rounding(dtype, FFN + DIM) for dtype in (torch.float32, torch.float64)}
WEIGHT_TOLERANCE[torch.bfloat16] = torch.finfo(torch.bfloat16).eps / 2 + WEIGHT_TOLERANCE[torch.float32]


def tp_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


def whole_outputs(zoo: Zoo, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = {}
    for name in zoo.names:
        whole = whole_values((SEQUENCE, BATCH, LAYERS[name][0]), f"{name}.x", 1.0)
        inputs[name] = split(whole, input_sharding(zoo, name).dim, tp_rank(), zoo.topology.tp).to(dtype).clone()
    with torch.no_grad():
        return {name: gather(y, output_sharding(zoo, name), tp_group()) for name, y in zoo.eval()(inputs).items()}


def oracle_weights(zoo: Zoo) -> dict[str, torch.Tensor]:
    """g * (W0 + s B A) of whole tensors in float64."""
    weights = {}
    for path, site in sites_of(zoo).items():
        rules = shardings(path, site.to_wrap)
        whole = {name: gather(tensor, rules[name], tp_group()) for name, tensor in tensors_of(site).items()}
        norms = row_norms(whole["weight"], whole["lora_a"], whole["lora_b"], site.scaling)
        dense = whole["weight"] + site.scaling * whole["lora_b"] @ whole["lora_a"]
        weights[path] = dense * (whole["magnitude"] / norms)[:, None]
    return weights


def errors_of(topology: Topology, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative errors of merged outputs and weights, and how many tensors unmerging did not bring back."""
    zoo = Zoo(topology, dtype, 0.25, layer_names(topology))
    set_adapter_values(zoo, topology)
    before = {name: value.clone() for name, value in zoo.state_dict().items() if torch.is_tensor(value)}
    adapted, expected = whole_outputs(zoo, dtype), oracle_weights(zoo)
    dora_fx.merge(zoo, keep_adapter=True)
    merged = whole_outputs(zoo, dtype)
    weights = {}
    for path in expected:
        linear = zoo.get_submodule(path)
        weights[path] = gather(linear.weight, shardings(path, linear)["weight"], tp_group())
    dora_fx.unmerge(zoo)
    after = zoo.state_dict()
    lost = sum(not torch.equal(after[name], value) for name, value in before.items())
    again = whole_outputs(zoo, dtype)
    return {
        "output": max(relative_error(merged[name], adapted[name]) for name in adapted),
        "weight": max(relative_error(weights[path], expected[path]) for path in expected),
        "lost": float(lost + sum(not torch.equal(again[name], adapted[name]) for name in adapted)),
        "layers": float(len(expected)),
    }


def all_errors() -> dict[tuple[str, str], dict[str, float]]:
    return {(str(t), str(d)): errors_of(t, d) for t in TOPOLOGIES for d in DTYPES}


def message_of_a_problem_on_one_rank() -> tuple[str, int]:
    """What the first rank is told when the second one's shard is not finite, and the adapters that are left."""
    topology = TOPOLOGIES[0]
    zoo = Zoo(topology, torch.float32, 0.0, ["column", "row"])
    if tp_rank() == 1:
        with torch.no_grad():
            zoo.layers["row"].adapter.linear_in.weight[0, 0] = float("inf")
    with pytest.raises(ValueError) as caught:
        dora_fx.merge(zoo)
    return str(caught.value), len(sites_of(zoo))


def run_all() -> Any:
    return all_errors(), message_of_a_problem_on_one_rank()


@pytest.fixture(scope="module")
def results() -> Any:
    return run_ranks(run_all, 2, 2)


@every_case("dtype", DTYPES, ids=str)
@every_case("topology", TOPOLOGIES, ids=str)
def test_merged_shards_compute_what_the_adapted_ones_do(topology, dtype, results, record_error):
    errors = results[0][str(topology), str(dtype)]
    record_error(f"{topology} output", "merged", dtype, errors["output"])
    record_error(f"{topology} weight", "merged", dtype, errors["weight"])
    assert errors["layers"] == len(layer_names(topology)) + (2 + 3 * ("transformer_layer" in layer_names(topology)))
    assert errors["lost"] == 0
    note_margin(errors["output"], OUTPUT_TOLERANCE[dtype])
    note_margin(errors["weight"], WEIGHT_TOLERANCE[dtype])
    assert errors["output"] <= OUTPUT_TOLERANCE[dtype]
    assert errors["weight"] <= WEIGHT_TOLERANCE[dtype]


def test_a_problem_of_one_rank_is_raised_on_all_before_anything_is_changed(results):
    message, num_sites = results[1]
    assert "layers.row.adapter.linear_in.weight: found NaN or inf" in message
    assert "(found on rank 1)" in message
    assert num_sites == 2
