"""Mixed batches at every layout: outputs and gradients of each sample's or token's adapter are those of it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn
from torch._dynamo.utils import counters

import dora_fx
from dora_fx import DoRA
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.distributed.launch import run_ranks
from tests.distributed.training import Mode, compiled, input_sharding, output_sharding
from tests.distributed.zoo import (
    BATCH,
    DIM,
    LAYERS,
    SEQUENCE,
    TE_LAYERS,
    Topology,
    Zoo,
    layer_names,
    make_config,
    set_adapter_values,
    sites_of,
    split,
    tp_rank,
    whole_values,
)
from tests.mixing import Mixing, Outputs, own_gradients
from tests.models import randomize_adapters

SAMPLES = ["second", "default", None, "second"]
# The third adapter has no samples. Layers without attention alone have ids of tokens here.
TOKENS = [["default"] * 3 + ["second"] * 4 + [None], *[["second", None] * (SEQUENCE // 2)] * (BATCH - 1)]
WITHOUT_SEQUENCES = {"transformer_layer"}


def build(topology: Topology, names: list[str], dropout: float) -> Zoo:
    zoo = Zoo(topology, torch.float64, dropout, names)
    set_adapter_values(zoo, topology)
    for seed, (name, dim) in enumerate({"second": DIM // 2, "third": DIM}.items(), start=tp_rank()):
        dora_fx.add_adapter(zoo, name, DoRA(["layers.*"], dim=dim, alpha=3 * dim, dropout=dropout))
        with dora_fx.adapter(zoo, name):
            randomize(zoo, seed)
    return zoo.train()


def randomize(zoo: Zoo, seed: int) -> None:
    """Values of each rank's own; what is whole on every rank is that of the first."""
    randomize_adapters(zoo, seed)
    for site in sites_of(zoo).values():
        for name, parameter in site.adapter.named_parameters():
            if site.adapter.placements[name].shard_dim is None:
                group = parallel_state.get_tensor_model_parallel_group()
                first = parallel_state.get_tensor_model_parallel_src_rank()
                torch.distributed.broadcast(parameter.detach(), first, group=group)


def inputs_of(zoo: Zoo) -> Outputs:
    """This rank's shards of every layer's input."""
    found = {}
    for name in zoo.names:
        whole = whole_values((SEQUENCE, BATCH, LAYERS[name][0]), f"{name}.x", 1.0)
        found[name] = split(whole, input_sharding(zoo, name).dim, tp_rank(), zoo.topology.tp).clone()
    return found


def masks_of(zoo: Zoo, ids: list[Any]) -> dict[str | None, Outputs]:
    """Where outputs are each adapter's, on this rank's own tokens where the output has those."""
    rows = [row if isinstance(row, list) else [row] * SEQUENCE for row in ids]
    masks: dict[str | None, Outputs] = {}
    # In the same order on all ranks, and also for those that have no sample on this one.
    for owner in ("default", "second", None):
        if owner is None and not any(None in row for row in rows):
            continue
        whole = torch.tensor([[float(value == owner) for value in row] for row in rows]).double().t()[..., None]
        masks[owner] = {}
        for name in zoo.names:
            is_sharded = output_sharding(zoo, name).dim == 0
            masks[owner][name] = split(whole, 0 if is_sharded else None, tp_rank(), zoo.topology.tp)
    return masks


def check_layers(
    topology: Topology, names: list[str], dropouts: list[float], compiler: str, base: str | None = None
) -> None:
    """Compare all kinds of ids, with samples of an adapter in place of those of the base if `base` names one."""
    samples: list[Any] = [value or base for value in SAMPLES]
    tokens = [[value or base for value in row] for row in TOKENS]
    for dropout in dropouts:
        for ids in (samples, tokens):
            torch._dynamo.reset()
            counters.clear()
            taken = [name for name in names if ids is samples or name not in WITHOUT_SEQUENCES]
            zoo = build(topology, taken, dropout)
            inputs = inputs_of(zoo)

            def call(called: Any, inputs: Outputs = inputs) -> Outputs:
                torch.manual_seed(5)
                return called(inputs)

            mixing = Mixing(zoo, lambda zoo=zoo, call=call: call(zoo), masks_of(zoo, ids))
            called = compiled(zoo, Mode(compiler=compiler))
            for number in range(2):
                with dora_fx.mixed(zoo, ids):
                    outputs = call(called)
                mixing.check(outputs)
                # The next batch has samples of the third alone.
                with dora_fx.mixed(zoo, ["third"] * BATCH if ids is samples else [["third"] * SEQUENCE] * BATCH):
                    Mixing.loss(call(called)).backward()
                for parameters in mixing.parameters.values():
                    own_gradients(parameters)
                assert counters["dora_fx"]["graphs_compiled"] == (0 if compiler == "eager" else 1), number


TOPOLOGIES = [Topology(), Topology(tp=2), Topology(tp=2, sequence_parallel=True)]
FEW = ["column_bias_added", "row_bias_added", "gated_mlp"]


def test_layers_at_two_ranks() -> None:
    topology = TOPOLOGIES[2]
    run_ranks(check_layers, topology.world_size, topology.tp, topology, FEW, [0.0], "eager")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "dora_fx_aot_eager"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_layers_of_all_layouts(topology: Topology, compiler: str) -> None:
    names = layer_names(topology)
    run_ranks(check_layers, topology.world_size, topology.tp, topology, names, [0.0, 0.3], compiler)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated_te")
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
# The emulated kernels of the base alone have no float64.
def test_layers_emulated_kernels(topology: Topology) -> None:
    run_ranks(check_layers, topology.world_size, topology.tp, topology, list(TE_LAYERS), [0.0], "eager", "default")


class MainGradients:
    """Gradients that Megatron's wrappers, one of each adapter, have completed and reduced."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo, self.wrappers = zoo, {}
        for name in dora_fx.adapter_names(zoo):
            with dora_fx.adapter(zoo, name), cuda_means_cpu():
                config = make_config(zoo.topology, torch.float64)
                self.wrappers[name] = DistributedDataParallel(config, DistributedDataParallelConfig(), zoo)

    def take(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        [wrapper] = [
            each for each in self.wrappers.values() if all(p in each.param_to_bucket_group for p in parameters.values())
        ]
        with cuda_means_cpu():
            wrapper.finish_grad_sync()
        found = {name: p.main_grad.clone() for name, p in parameters.items()}
        wrapper.zero_grad_buffer()
        # Without samples of this adapter on any rank.
        return found if any(bool(value.any()) for value in found.values()) else dict.fromkeys(found)


def refuse_torchs_wrapper() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("one", "two"):
        dora_fx.add_adapter(model, name, DoRA(["0"], dim=2))
    wrapper = torch.nn.parallel.DistributedDataParallel(model)
    for given in (model, wrapper):
        with pytest.raises(ValueError, match="which does not reduce the gradients"), dora_fx.mixed(given, ["two"]):
            pass
        with torch.no_grad(), dora_fx.mixed(given, ["two"]):
            wrapper(torch.ones(1, 1, 4))


def check_wrapped(topology: Topology) -> None:
    if topology.dp > 1:
        refuse_torchs_wrapper()
    zoo = build(topology, FEW, 0.0)
    gradients, inputs = MainGradients(zoo), inputs_of(zoo)
    # The other data-parallel rank has no sample of one of them.
    ids = [SAMPLES, ["default", None, None, "default"]][parallel_state.get_data_parallel_rank()]
    mixing = Mixing(zoo, lambda: zoo(inputs), masks_of(zoo, ids), gradients.take)
    with dora_fx.mixed(zoo, ids):
        outputs = gradients.wrappers["default"](inputs)
    mixing.check(outputs)


@pytest.mark.parametrize("topology", [Topology(tp=2, sequence_parallel=True), Topology(dp=2)], ids=str)
def test_gradients_in_megatrons_wrappers(topology: Topology) -> None:
    run_ranks(check_wrapped, topology.world_size, topology.tp, topology)
