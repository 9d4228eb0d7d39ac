"""Data parallelism of torch around adapted models, on two ranks: the right numbers, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as TorchDDP

import dora_fx
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.distributed.launch import run_layout, run_ranks
from tests.distributed.moe_layers import HIDDEN, SEQUENCE, ExpertLayout, MoE, moe_config
from tests.distributed.moe_layers import attach as attach_to_experts
from tests.models import config, randomize_adapters, sites

WORLD, STEPS = 2, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """Two blocks in float64; Megatron's data parallelism wants a config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build() -> Network:
    torch.manual_seed(0)
    return Network().double()


def attach(model: Any) -> Any:
    torch.manual_seed(1)
    return dora_fx.DoRA(["up", "down"], dim=4)(model)


def whole(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in parameters]


def train(model: Callable[..., torch.Tensor], inner: nn.Module, own_batch: bool = True) -> list[torch.Tensor]:
    """Trained values after some steps on the same batches, of which a rank may take its part alone."""
    parameters = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        batch = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        x = batch.chunk(WORLD)[dist.get_rank()] if own_batch else batch
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return whole(parameters)


def ddp(model: nn.Module) -> nn.Module:
    return TorchDDP(model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="dora_fx")


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled_blocks(model: Any) -> Any:
    for block in model.blocks:
        block.compile(backend="dora_fx", fullgraph=True)
    return model


AFTER: dict[str, Callable[[Any], Any]] = {
    "ddp": ddp,
    "compiled_ddp": lambda model: compiled(ddp(model)),
    "ddp_of_compiled": lambda model: ddp(compiled(model)),
    "fsdp2": fsdp2,
    "fsdp2_of_compiled_blocks": lambda model: fsdp2(compiled_blocks(model)),
}


def adapted() -> Any:
    model = attach(build())
    randomize_adapters(model)
    return model


def largest_differences() -> dict[str, float]:
    expected = adapted()
    oracle = train(expected, expected, own_batch=False)
    found = {}
    for name, wrap in AFTER.items():
        torch._dynamo.reset()
        model = adapted()
        values = train(wrap(model), model)
        found[name] = max((one - other).abs().max().item() for one, other in zip(values, oracle, strict=True))
    return found


def test_wrapped_after_attaching_trains_as_one_rank() -> None:
    # Values of order one in float64; Adam divides by the root of the second moment, which multiplies the rounding.
    assert all(difference < 1e-10 for difference in run_ranks(largest_differences, WORLD, 1).values())


BEFORE: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "the_wrapper": lambda model, wrapper: wrapper,
    "compiled_wrapper": lambda model, wrapper: torch.compile(wrapper, backend="eager"),
    "the_model_inside": lambda model, wrapper: model,
    "a_part": lambda model, wrapper: model.blocks,
}


def refusals(replicating: bool) -> list[str]:
    """Attach by each handle of a model with data parallelism around; returns the messages, nothing may change."""
    found = []
    # A part of a module that `replicate` changed has no trace of it.
    for name, given in list(BEFORE.items())[: -1 if replicating else None]:
        model = build()
        wrapper = replicate(model) if replicating else TorchDDP(model)
        before = list(model.modules())
        with pytest.raises(ValueError) as raised:
            attach(given(model, wrapper))
        found.append(str(raised.value))
        assert list(model.modules()) == before
        assert all(parameter.requires_grad for parameter in model.parameters())
        del wrapper, raised
        if not replicating:
            # A wrapper that is gone is no obstacle.
            attach(BEFORE["a_part" if name == "a_part" else "the_model_inside"](model, model))
            assert len(sites(model)) == 4
    return found


def attach_twice() -> int:
    model = TorchDDP(attach(build()))
    attach(model)
    return len(sites(model))


def torch_data_parallelism() -> tuple[list[str], int]:
    return refusals(replicating=False) + refusals(replicating=True), attach_twice()


def test_torch_data_parallelism_before_attaching_is_refused() -> None:
    messages, num_sites = run_ranks(torch_data_parallelism, WORLD, 1)
    assert len(messages) == 2 * len(BEFORE) - 1
    for message in messages:
        assert message.startswith("torch.nn.parallel.DistributedDataParallel: found one that was made before")
    # A second call that adds nothing is not refused.
    assert num_sites == 4


def over_parts_of_a_model(layout: ExpertLayout) -> list[str]:
    """What a first step, and a check, say of torch's wrapper around a model that ranks share out."""
    found = []
    for compiles in (False, True):
        model = attach_to_experts(MoE(moe_config(layout, torch.float32)))
        wrapper = TorchDDP(model)
        x = torch.randn(SEQUENCE // layout.tp, 2, HIDDEN)
        (torch.compile(wrapper, backend="eager") if compiles else wrapper)(x).square().mean().backward()
        with pytest.raises(ValueError) as raised:
            torch.optim.AdamW(dora_fx.parameter_groups(model, lr=1e-2)).step()
        found.append(str(raised.value))
        with pytest.raises(ValueError) as raised:
            dora_fx.check(model, {"x": x})
        found.append(str(raised.value))
    return found


@pytest.mark.parametrize(
    ("layout", "kind"), [(ExpertLayout(2, tp=2, etp=2), "tensor"), (ExpertLayout(2, ep=2), "expert")], ids=str
)
def test_torch_data_parallelism_over_parts_of_a_model_is_refused(layout: ExpertLayout, kind: str) -> None:
    """It has written the frozen weights of the first rank over the others'."""
    for message in run_layout(over_parts_of_a_model, layout):
        assert f"joins this rank with rank 1, which holds another {kind}-parallel part of the model" in message


def megatron_gradients() -> dict[str, list[float]]:
    """Differences between the ranks' gradients after Megatron's reduction."""
    differences: dict[str, list[float]] = {name: [] for name in BEFORE}
    for name, given in BEFORE.items():
        model = build()
        with cuda_means_cpu():
            wrapper = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
            attach(given(model, wrapper))
            randomize_adapters(model)
            torch.manual_seed(dist.get_rank())
            wrapper(torch.randn(4, 16, dtype=torch.float64)).square().mean().backward()
            finalize_model_grads([wrapper])
        for parameter in model.parameters():
            if parameter.requires_grad:
                copies = [torch.empty_like(parameter.main_grad) for _ in range(WORLD)]
                dist.all_gather(copies, parameter.main_grad)
                assert copies[0].any()
                differences[name].append((copies[0] - copies[1]).abs().max().item())
    return differences


def test_megatron_data_parallelism_is_found_whatever_the_handle() -> None:
    assert run_ranks(megatron_gradients, WORLD, 1) == {name: [0.0] * 12 for name in BEFORE}


def sharded_refusals() -> dict[str, str]:
    found = {}

    def refuse(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (ValueError, dora_fx.CheckpointError) as error:
            found[name] = str(error)

    refuse("attach", lambda: attach(fsdp2(build())))
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {"blocks.0.up": ColwiseParallel()}
    refuse("tensor_parallel", lambda: attach(parallelize_module(build(), mesh, plan)))
    model = fsdp2(adapted())
    refuse("merge", lambda: dora_fx.merge(model))
    with dora_fx.disable_adapter(model):
        model(torch.randn(2, 16, dtype=torch.float64))
    return found


def test_weights_that_are_sharded_otherwise_are_refused_by_name() -> None:
    found = run_ranks(sharded_refusals, WORLD, 1)
    assert found.keys() == {"attach", "tensor_parallel", "merge"}
    assert found["attach"].startswith("blocks.0.up.weight: found a DTensor with placements (Shard(dim=0),)")
    assert found["tensor_parallel"].startswith("blocks.0.up.weight: found a DTensor with placements (Shard(dim=0),)")
    assert found["merge"].startswith("blocks.0.up.to_wrap.weight: found a DTensor with placements")
