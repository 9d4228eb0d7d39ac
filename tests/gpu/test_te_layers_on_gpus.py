"""Layers over Transformer Engine with its real kernels: one CUDA device, and tensor parallelism over two with NCCL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dora_fx.megatron.world import megatron_world
from tests.closeness import assert_below, relative_error
from tests.distributed.oracle import reference_for
from tests.distributed.training import TRAINED, input_sharding, output_sharding
from tests.distributed.zoo import (
    BATCH,
    SEQUENCE,
    TE_LAYERS,
    Sharding,
    Topology,
    Zoo,
    gather,
    set_adapter_values,
    shardings,
    sites_of,
    split,
    tensors_of,
    whole_values,
)
from tests.processes import run_processes
from tests.te_layers import SINGLE_LAYERS, adapt, layer_and_input, output_of

Results = dict[str, torch.Tensor]


def why_not(num_devices: int) -> str:
    """Why the tests cannot run here; "" if they can."""
    if torch.cuda.device_count() < num_devices:
        return f"needs {num_devices} CUDA devices"
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        return f"needs Transformer Engine: {error}"
    return "" if te is not None else "needs Transformer Engine"


# "", or the reason for which tests on one device, or two, are skipped: these kernels run on CUDA alone.
ONE, TWO = why_not(1), why_not(2)
# Transformer Engine multiplies float32 with TF32's 10 bits.
KERNELS_AGREE = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
ORACLE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def cuda_world() -> Iterator[None]:
    with megatron_world("cuda"):
        yield


@pytest.mark.skipif(bool(ONE), reason=ONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SINGLE_LAYERS)
def test_a_fresh_adapter_is_the_layer_itself(name, dtype, cuda_world):
    model, x = on_device(name, dtype)
    base = output_of(model, x)
    adapt(model, trained=False)
    assert_below({name: relative_error(output_of(model, x), base)}, KERNELS_AGREE[dtype])


@pytest.mark.skipif(bool(ONE), reason=ONE)
@pytest.mark.parametrize("compiler", ["eager", "dora_fx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SINGLE_LAYERS)
def test_equals_the_oracle(name, dtype, compiler, cuda_world):
    model, x = on_device(name, dtype)
    site = adapt(model)
    reference, wide = reference_for(site), x.detach().double().requires_grad_()
    call = output_of if compiler == "eager" else torch.compile(output_of, backend=compiler, fullgraph=True)
    output, returned = call(model, x), reference(wide)
    expected = returned[0] if returned[1] is None else returned[0] + returned[1]
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    errors = {
        "y": relative_error(output, expected),
        "dx": relative_error(x.grad, wide.grad),
        "dA": relative_error(site.adapter.linear_in.weight.grad, reference.lora_a.grad),
        "dB": relative_error(site.adapter.linear_out.weight.grad, reference.lora_b.grad),
        "dm": relative_error(site.adapter.weight_magnitude.grad, reference.magnitude.grad),
    }
    assert_below(errors, ORACLE[dtype])


def on_device(name: str, dtype: torch.dtype) -> tuple[torch.nn.ModuleDict, torch.Tensor]:
    model, x = layer_and_input(name, dtype)
    return model.cuda(), x.detach().cuda().requires_grad_()


@pytest.mark.skipif(bool(TWO), reason=TWO)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "dora_fx"])
def test_two_ranks_are_one(sequence_parallel, compiler):
    one = on_ranks(Topology(), compiler, "cuda")
    two = on_ranks(Topology(tp=2, sequence_parallel=sequence_parallel), compiler, "cuda")
    assert one.keys() == two.keys()
    assert_below({key: relative_error(two[key], value) for key, value in one.items()}, 1e-5)


def on_ranks(topology: Topology, compiler: str, device: str) -> Results:
    """Outputs and gradients of every layer, whole, from the ranks of a topology."""
    with tempfile.TemporaryDirectory() as folder:
        run_processes(_rank, (topology, compiler, device, folder), topology.world_size)
        results: Results = torch.load(Path(folder) / "result")
    return results


def _rank(rank: int, topology: Topology, compiler: str, device: str, folder: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(folder) / "store"), topology.world_size)
    world = dict(store=store, global_rank=rank, world_size=topology.world_size)
    with megatron_world(device, tensor_model_parallel_size=topology.tp, **world):
        results = _whole_results(topology, compiler, device)
    if rank == 0:
        torch.save(results, Path(folder) / "result")


def _whole_results(topology: Topology, compiler: str, device: str) -> Results:
    zoo = Zoo(topology, torch.float32, 0.0, tuple(TE_LAYERS)).to(device)
    set_adapter_values(zoo, topology)
    group, results = parallel_state.get_tensor_model_parallel_group(), {}
    for name in zoo.names:
        call = zoo.call_layer
        if compiler != "eager":
            torch._dynamo.reset()
            call = torch.compile(zoo.call_layer, backend=compiler, fullgraph=True)
        own = input_sharding(zoo, name)
        whole = whole_values((SEQUENCE, BATCH, TE_LAYERS[name][0]), f"{name}.x", 1.0)
        x = split(whole, own.dim, group.rank(), topology.tp).to(device, torch.float32).requires_grad_()
        y = call(name, x)
        y.square().sum().backward()
        results[f"{name} y"] = gather(y, output_sharding(zoo, name), group).cpu()
        results[f"{name} dx"] = gather(x.grad, own, group).cpu()
    for path, site in sites_of(zoo).items():
        rules: dict[str, Sharding] = shardings(path, site.to_wrap)
        for key in TRAINED:
            results[f"{path} d{key}"] = gather(tensors_of(site)[key].grad, rules[key], group).cpu()
    return results
