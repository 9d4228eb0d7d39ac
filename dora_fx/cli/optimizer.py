"""AdamW over the adapter, with float32 copies of what the model keeps in less, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_fx.cli.options import TrainingOptions


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


class AdapterOptimizer:
    """AdamW on the parameters that require gradients.

    A bfloat16 parameter has a float32 master that collects gradients and takes the updates: bfloat16 holds three
    digits, and an update smaller than the last of them would be lost.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self._masters: dict[str, Tensor] = {}
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in parameters.items():
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
        masters = list(self._masters.values())
        grad_norm = nn.utils.clip_grad_norm_(masters, max_grad_norm or math.inf)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._round_to_model()
        return float(grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, the parameters' full-precision values among it."""
        return {
            "masters": {name: master.detach().clone() for name, master in self._masters.items()},
            "adamw": self._adamw.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore values and moments; raises ValueError unless the parameters are the same."""
        if state["masters"].keys() != self._masters.keys():
            raise ValueError("the saved adapter has other parameters than the model's")
        for name, master in self._masters.items():
            master.copy_(state["masters"][name])
        self._adamw.load_state_dict(state["adamw"])
        self._round_to_model()

    @torch.no_grad()
    def _round_to_model(self) -> None:
        for parameter, master in self._rounded:
            parameter.copy_(master)
