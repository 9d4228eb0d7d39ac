"""The layer of `moe_layers` in training under Megatron's data parallelism, and the oracle's training."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import nn

from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.distributed.moe_layers import (
    BATCH,
    ExpertLayout,
    MoE,
    Oracle,
    Results,
    TensorsOf,
    adapted,
    batch,
    moe_config,
    own_tokens,
    tensors_of_sites,
    weighted_sum,
)

LEARNING_RATE, CLIP, MICRO_BATCHES, STEPS = 1e-2, 1.0, 2, 3


def oracle_training(clip: float, num_shared: int = 1) -> Results:
    """Gradients of the first step, their norm in every step, and the parameters after three steps of Adam.

    Args:
        clip: the largest norm of gradients; 0 for any.
    """
    oracle = Oracle(num_shared)
    parameters = dict(oracle.trained)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, eps=1e-8)
    found: Results = {}
    for number in range(STEPS):
        optimizer.zero_grad()
        for part in range(MICRO_BATCHES):
            which = number * MICRO_BATCHES + part
            loss = (oracle(batch(which)) * batch(which, "loss")).sum() / BATCH
            loss.backward()
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if number == 0:
            found |= {f"d {key}": parameter.grad.clone() for key, parameter in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip or torch.inf)
        found[f"norm {number}"] = norm.detach().reshape(1)
        optimizer.step()
    return {**found, **{f"trained {key}": parameter.detach() for key, parameter in parameters.items()}}


@dataclass(frozen=True)
class Mode:
    """How the layer is trained with Megatron's data parallelism."""

    dtype: torch.dtype = torch.float64
    complete_gradients: str = "auto"
    distributed: bool = False
    overlap: bool = False
    late: bool = False

    @property
    def clip(self) -> float:
        """Megatron clips gradients in float32 alone."""
        return 0.0 if self.dtype == torch.float64 else CLIP

    def __str__(self) -> str:
        flags = [name for name in ("distributed", "overlap", "late") if getattr(self, name)]
        return "-".join([str(self.dtype).removeprefix("torch."), self.complete_gradients, *flags])


class Training:
    """The layer under Megatron's DistributedDataParallel and optimizer on one rank.

    Args:
        model: with adapters, in place of a new one of sequential experts.
        read_tensors: reads the model's adapters.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        mode: Mode,
        model: nn.Module | None = None,
        read_tensors: TensorsOf = tensors_of_sites,
    ) -> None:
        torch._dynamo.reset()
        assert model is None or (mode.complete_gradients, mode.late) == ("auto", False), "it has its adapters"
        self.layout, self.mode, self.read_tensors = layout, mode, read_tensors
        self.model: Any = MoE(moe_config(layout, mode.dtype)) if model is None else model
        config = self.model.config
        is_bf16 = mode.dtype == torch.bfloat16
        settings = {"complete_gradients": mode.complete_gradients}
        with cuda_means_cpu():
            if model is None and not mode.late:
                adapted(self.model, **settings)
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=is_bf16,
                overlap_grad_reduce=mode.overlap,
                use_distributed_optimizer=mode.distributed,
                bucket_size=1000,
            )
            self.ddp = DistributedDataParallel(config, ddp_config, self.model)
            if mode.late:
                adapted(self.ddp, **settings)
            optimizer_config = OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                weight_decay=0.0,
                clip_grad=mode.clip,
                params_dtype=mode.dtype,
                bf16=is_bf16,
                use_distributed_optimizer=mode.distributed,
            )
            self.optimizer = get_megatron_optimizer(optimizer_config, [self.ddp])

    def step(self, number: int) -> float:
        """Do one step and return the norm of the gradients, before they are clipped."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        dp = parallel_state.get_data_parallel_world_size()
        for part in range(MICRO_BATCHES):
            which = number * MICRO_BATCHES + part
            x = own_tokens(batch(which), self.layout).to(self.mode.dtype).requires_grad_()
            with nullcontext() if part == MICRO_BATCHES - 1 else self.ddp.no_sync():
                # Data parallelism averages over its ranks.
                loss = weighted_sum(self.ddp(x), self.layout, which) * dp / BATCH
                with cuda_means_cpu() if self.mode.overlap else nullcontext():
                    loss.backward()
        with cuda_means_cpu():
            finalize_model_grads([self.ddp])
            self.gradients = self._gradients() if number == 0 and not self.mode.distributed else {}
            _, norm, _ = self.optimizer.step()
        return float(norm)

    def _gradients(self) -> Results:
        found = self.read_tensors(self.model, lambda parameter: parameter.main_grad)
        return {f"d {name}": value for name, value in found.items()}

    def results(self) -> Results:
        found: Results = {}
        for number in range(STEPS):
            found[f"norm {number}"] = torch.tensor([self.step(number)], dtype=torch.float64)
            found |= self.gradients
        return {**found, **{f"trained {name}": value for name, value in self.read_tensors(self.model).items()}}
