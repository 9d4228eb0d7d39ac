"""Train the zoo on one rank of a topology with Megatron's own data parallelism and optimizer, and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch.utils.checkpoint import checkpoint

from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.distributed.zoo import (
    BATCH,
    LAYERS,
    SEQUENCE,
    Sharding,
    Topology,
    Zoo,
    gather,
    layer_names,
    make_config,
    set_adapter_values,
    shardings,
    sites_of,
    split,
    tensors_of,
    whole_values,
)

NUM_MICROBATCHES = 2
TRAINED = ("lora_a", "lora_b", "magnitude")


@dataclass(frozen=True)
class Mode:
    """How the zoo is run."""

    compiler: str = "eager"
    dtype: torch.dtype = torch.float64
    dropout: float = 0.0
    recompute: bool = False
    num_steps: int = 20
    clip_grad: float = 0.0
    complete_gradients: str = "auto"
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = False

    def __str__(self) -> str:
        parts = [self.compiler, str(self.dtype).removeprefix("torch.")]
        parts += ["dropout"] * (self.dropout > 0) + ["recompute"] * self.recompute
        return "-".join(parts)


def input_sharding(zoo: Zoo, name: str) -> Sharding:
    """How a layer's input is spread over the tensor-parallel group; dimension 0 is the sequence."""
    if name.removeprefix("te_").startswith("row") and name != "row_split_input":
        return Sharding(2)
    return Sharding(0 if zoo.topology.sequence_parallel else None)


def output_sharding(zoo: Zoo, name: str) -> Sharding:
    """How a layer's output is spread over the tensor-parallel group."""
    is_te_column = name.startswith("te_") and "column" in name
    if is_te_column or name in ("column", "column_bias_added", "column_bias_returned", "output_layer"):
        return Sharding(2)
    return Sharding(0 if zoo.topology.sequence_parallel and name != "column_gather_output" else None)


def compiled(zoo: Zoo, mode: Mode) -> Any:
    function = (lambda inputs: checkpoint(zoo, inputs, use_reentrant=False)) if mode.recompute else zoo
    if mode.compiler == "eager":
        return function
    if mode.compiler == "inductor":
        return torch.compile(function, backend="inductor", fullgraph=True)
    inner = mode.compiler.removeprefix("dora_fx_")
    return torch.compile(function, backend="dora_fx", options={"inner_compiler": inner}, fullgraph=True)


def run_rank(
    topology: Topology, modes: list[Mode], names: Sequence[str] | None = None
) -> list[dict[str, torch.Tensor]]:
    """Run every mode on this rank; for each: quantity -> whole tensor in float64. All layers unless `names` says."""
    return [TrainingRun(topology, mode, names).results() for mode in modes]


class TrainingRun:
    """One zoo, one mode: gradients of the first step, then `num_steps` optimizer steps."""

    def __init__(self, topology: Topology, mode: Mode, names: Sequence[str] | None = None) -> None:
        torch._dynamo.reset()
        self.topology, self.mode = topology, mode
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.zoo = Zoo(
            topology,
            mode.dtype,
            mode.dropout,
            names or layer_names(topology),
            complete_gradients=mode.complete_gradients,
        )
        self.initial = self.parameters("initial")
        set_adapter_values(self.zoo, topology)
        with cuda_means_cpu():
            config = make_config(topology, mode.dtype)
            is_bf16 = mode.dtype == torch.bfloat16
            # As Megatron's own training does: bfloat16 weights, and gradients and optimizer state in float32.
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=is_bf16,
                overlap_grad_reduce=mode.overlap_grad_reduce,
                use_distributed_optimizer=mode.distributed_optimizer,
                # Several buckets, so that some are reduced while others still wait for gradients.
                bucket_size=2000,
            )
            self.ddp = DistributedDataParallel(config, ddp_config, self.zoo)
            settings = OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.0,
                clip_grad=mode.clip_grad,
                params_dtype=mode.dtype,
                bf16=is_bf16,
                use_distributed_optimizer=mode.distributed_optimizer,
            )
            self.optimizer = get_megatron_optimizer(settings, [self.ddp])
        self.function = compiled(self.zoo, mode)
        self.first: dict[str, torch.Tensor] = {}

    def results(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        results = dict(self.initial)
        for step in range(self.mode.num_steps):
            grad_norm = self.step(first=step == 0)
            if step == 0:
                results.update(self.first, grad_norm=grad_norm, **self.parameters("after 1"))
        results.update(self.parameters(f"after {self.mode.num_steps}"))
        results["replicas differ by"] = self.replica_difference()
        return results

    def step(self, *, first: bool) -> torch.Tensor:
        """One optimizer step over the micro-batches; returns the gradient norm that Megatron clipped by."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for microbatch in range(NUM_MICROBATCHES):
            is_last = microbatch == NUM_MICROBATCHES - 1
            with nullcontext() if is_last else self.ddp.no_sync():
                self.forward_backward(microbatch, keep=first)
        with cuda_means_cpu():
            finalize_model_grads([self.ddp])
            if first:
                self.first.update(self.gradients())
            _, grad_norm, _ = self.optimizer.step()
        return torch.tensor([float(grad_norm)])

    def forward_backward(self, microbatch: int, *, keep: bool) -> None:
        shards = {name: self.own_input(name, microbatch) for name in self.zoo.names}
        outputs = self.function(shards)
        loss = sum(self.weighted_sum(name, y, microbatch) for name, y in outputs.items())
        # A bucket that is full starts to be reduced within the backward pass.
        with cuda_means_cpu() if self.mode.overlap_grad_reduce else nullcontext():
            loss.backward()
        if keep:
            self.first["loss"] = self.first.get("loss", 0.0) + self.whole_loss(outputs, microbatch)
        if keep:
            for name in self.zoo.names:
                batch = f"microbatch {microbatch}"
                self.first[f"{name} y {batch}"] = self.whole(outputs[name], output_sharding(self.zoo, name))
                dx = shards[name].grad / self.topology.dp
                self.first[f"{name} dx {batch}"] = self.whole(dx, input_sharding(self.zoo, name))

    def own_input(self, name: str, microbatch: int) -> torch.Tensor:
        """This rank's shard of a layer's input."""
        whole = whole_values((SEQUENCE, BATCH, LAYERS[name][0]), f"{name}.x", 1.0)
        return self.own(self.own_batch(whole, microbatch), input_sharding(self.zoo, name)).requires_grad_()

    def weighted_sum(self, name: str, y: torch.Tensor, microbatch: int) -> torch.Tensor:
        """A loss whose gradient differs in every element, averaged over the whole batch."""
        sharding = output_sharding(self.zoo, name)
        shape = list(y.shape)
        shape[1] = BATCH
        if sharding.dim is not None:
            shape[sharding.dim] *= self.topology.tp
        weights = whole_values(tuple(shape), f"{name}.loss", 1.0)
        # Data parallelism averages gradients over its ranks.
        return (y * self.own(self.own_batch(weights, microbatch), sharding)).sum() * self.topology.dp / BATCH

    def whole_loss(self, outputs: dict[str, torch.Tensor], microbatch: int) -> torch.Tensor:
        """Each layer's loss of one micro-batch over all ranks, each token and feature counted once."""
        totals = torch.zeros(len(outputs), dtype=torch.float64)
        for index, (name, y) in enumerate(outputs.items()):
            copies = 1 if output_sharding(self.zoo, name).dim is not None else self.topology.tp
            # Terms of both signs nearly cancel, so the sum itself is taken in float64.
            totals[index] = self.weighted_sum(name, y.detach().double(), microbatch) / (copies * self.topology.dp)
        dist.all_reduce(totals)
        return totals

    def own_batch(self, whole: torch.Tensor, microbatch: int) -> torch.Tensor:
        """This data-parallel rank's part of a batch for one micro-batch."""
        return split(split(whole, 1, microbatch, NUM_MICROBATCHES), 1, self.dp_rank, self.topology.dp)

    def own(self, whole: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """This tensor-parallel rank's shard, in the model's dtype."""
        shard = split(whole, sharding.dim, self.tp_group.rank(), self.topology.tp)
        return shard.to(self.mode.dtype).clone()

    def whole(self, tensor: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """The tensor over the tensor-parallel group and, along the batch, the data-parallel group."""
        tensor = gather(tensor, sharding, self.tp_group)
        return gather(tensor, Sharding(1), parallel_state.get_data_parallel_group())

    def gradients(self) -> dict[str, torch.Tensor]:
        return self._of_parameters("d", lambda parameter: parameter.main_grad)

    def parameters(self, when: str) -> dict[str, torch.Tensor]:
        return self._of_parameters(f"{when}: ", lambda parameter: parameter)

    def _of_parameters(self, prefix: str, read: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for path, site in sites_of(self.zoo).items():
            rules, tensors = shardings(path, site.to_wrap), tensors_of(site)
            for name in TRAINED:
                found[f"{path} {prefix}{name}"] = gather(read(tensors[name]), rules[name], self.tp_group)
        return found

    def replica_difference(self) -> torch.Tensor:
        """Largest bitwise difference of anything that several ranks hold a copy of."""
        worst = torch.zeros(1, dtype=torch.float64)
        for path, site in sites_of(self.zoo).items():
            rules, tensors = shardings(path, site.to_wrap), tensors_of(site)
            for name in TRAINED:
                tensor = tensors[name].detach().double()
                groups = [parallel_state.get_data_parallel_group()]
                groups += [self.tp_group] if rules[name].dim is None else []
                for group in groups:
                    high, low = tensor.clone(), tensor.clone()
                    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
                    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
                    worst = torch.maximum(worst, (high - low).abs().max())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst
