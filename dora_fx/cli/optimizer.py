"""AdamW over the adapter, with float32 copies of what the model keeps in less, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from dora_fx.cli.options import TrainingOptions
from dora_fx.whole_tensors import AdapterShards


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Of optimizer step number `step`, counted from 0: linear warm-up, then the schedule down to zero."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    if options.schedule == "linear":
        return options.lr * (1.0 - progress)
    if options.schedule == "cosine":
        return options.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.lr


_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdapterOptimizer:
    """AdamW on a model's adapters.

    A bfloat16 parameter has a float32 master that collects gradients and takes the updates: bfloat16 holds three
    digits, and an update smaller than the last of them would be lost.

    Args:
        shards: the adapters of this rank; all ranks of a tensor-parallel group step together.
        weight_decay: on the low-rank factors; magnitudes are not decayed.
    """

    def __init__(self, shards: AdapterShards, weight_decay: float) -> None:
        self._shards = shards
        self._masters: dict[str, Tensor] = {}
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in shards.parameters.items():
            if parameter.dtype is torch.float32:
                self._masters[name] = parameter
            else:
                master = parameter.detach().float().requires_grad_()
                self._masters[name] = master
                self._rounded.append((parameter, master))
        magnitudes = [m for name, m in self._masters.items() if name.endswith(".weight_magnitude")]
        factors = [m for name, m in self._masters.items() if not name.endswith(".weight_magnitude")]
        groups = [{"params": factors, "weight_decay": weight_decay}, {"params": magnitudes, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]])

    def accumulate(self) -> None:
        """Take over the gradients of one backward pass; call it after each."""
        for parameter, master in self._rounded:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip (unless `max_grad_norm` is 0), update, clear the gradients; return their norm before clipping."""
        grad_norm = self._grad_norm()
        nn.utils.clip_grads_with_norm_(self._masters.values(), max_grad_norm or math.inf, grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._round_to_model()
        return float(grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by parameter name, for `load_state_dict` at any tensor-parallel size."""
        whole, state = self._shards.gather, self._adamw.state
        stepped = {name: state[master] for name, master in self._masters.items() if master in state}
        return {
            "masters": {name: whole(name, master) for name, master in self._masters.items()},
            "updates": {name: float(moments["step"]) for name, moments in stepped.items()},
            **{key: {name: whole(name, moments[key]) for name, moments in stepped.items()} for key in _MOMENTS},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore values and moments; raises ValueError, having changed nothing, unless they are these parameters'."""
        if state["masters"].keys() != self._masters.keys():
            raise ValueError("the saved adapter has other parameters than the model's")
        own = {
            key: {name: self._shards.scatter(name, whole) for name, whole in state[key].items()}
            for key in ("masters", *_MOMENTS)
        }
        for name, master in self._masters.items():
            master.copy_(own["masters"][name])
            if name in state["updates"]:
                moments = {key: own[key][name].to(master.device) for key in _MOMENTS}
                self._adamw.state[master] = {"step": torch.tensor(state["updates"][name]), **moments}
        self._round_to_model()

    def _grad_norm(self) -> Tensor:
        """Norm over all ranks' gradients, each element counted once."""
        grads = {name: master.grad for name, master in self._masters.items() if master.grad is not None}
        sharded = [grad for name, grad in grads.items() if self._shards.is_sharded(name)]
        whole = [grad for name, grad in grads.items() if not self._shards.is_sharded(name)]
        if not sharded:
            return nn.utils.get_total_norm(whole)
        square = nn.utils.get_total_norm(sharded).square()
        dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
        return (square + nn.utils.get_total_norm(whole).square()).sqrt()

    @torch.no_grad()
    def _round_to_model(self) -> None:
        for parameter, master in self._rounded:
            parameter.copy_(master)
