"""The zoo on one rank with every adapted layer computed as the paper writes it, and a plain AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dora_fx.function.dropout import draw_dropout_key, keep_mask
from tests.distributed.training import NUM_MICROBATCHES, Mode, TrainingRun
from tests.distributed.zoo import Topology, sites_of, tensors_of
from tests.reference import ReferenceLinear, normalised


class OracleRun(TrainingRun):
    """The same quantities as a `TrainingRun`, without the library's arithmetic, compiler and optimizer."""

    def __init__(self, mode: Mode, names: Sequence[str]) -> None:
        plain = Mode(dtype=torch.float64, dropout=mode.dropout, num_steps=mode.num_steps)
        self.references: dict[str, ReferenceLinear] = {}
        super().__init__(Topology(), plain, names)
        for path, site in sites_of(self.zoo).items():
            self.references[path] = reference_for(site)
            parent, _, name = path.rpartition(".")
            setattr(self.zoo.get_submodule(parent), name, self.references[path])
        parameters = [p for reference in self.references.values() for p in reference.parameters()]
        self.clip_grad = mode.clip_grad
        self.adamw = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)

    def step(self, *, first: bool) -> torch.Tensor:
        self.adamw.zero_grad()
        for microbatch in range(NUM_MICROBATCHES):
            self.forward_backward(microbatch, keep=first)
        if first:
            self.first.update(self.gradients())
        norm = nn.utils.clip_grad_norm_(self.adamw.param_groups[0]["params"], self.clip_grad or float("inf"))
        self.adamw.step()
        return norm.reshape(1)

    def gradients(self) -> dict[str, torch.Tensor]:
        return self._of_parameters("d", lambda parameter: parameter.grad)

    def _of_parameters(self, prefix: str, read: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.references:
            return super()._of_parameters(prefix, read)
        return {
            f"{path} {prefix}{name}": read(getattr(reference, name)).detach().clone()
            for path, reference in self.references.items()
            for name in ("lora_a", "lora_b", "magnitude")
        }

    def replica_difference(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.float64)


def reference_for(site: Any) -> ReferenceLinear:
    """The oracle's layer with a site's values; it returns its bias where the base layer does."""
    tensors, base = tensors_of(site), site.to_wrap
    is_te = type(base).__name__.startswith("TE")
    returns_bias = base.te_return_bias if is_te else base.skip_bias_add
    bias = base.bias if not is_te or base.use_bias else None
    returned_bias = bias if returns_bias else None
    dropout = site.adapter.dropout
    return ReferenceLinear(
        tensors["weight"],
        None if returns_bias else bias,
        tensors["lora_a"],
        tensors["lora_b"],
        tensors["magnitude"],
        scaling=site.scaling,
        dropout_p=dropout,
        returns=lambda output: (output, returned_bias),
        draw_mask=(lambda x: keep_mask(x, draw_dropout_key(x, ""), site.adapter.dropout_threshold, False))
        if dropout
        else None,
        prepare=_norm_of(base),
    )


def _norm_of(base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if type(base).__name__ != "TELayerNormColumnParallelLinear":
        return lambda x: x
    weight, bias = base.layer_norm_weight.detach(), base.layer_norm_bias
    return partial(
        normalised,
        name=base.config.normalization,
        weight=weight,
        bias=None if bias is None else bias.detach(),
        eps=base.config.layernorm_epsilon,
        zero_centered=base.config.layernorm_zero_centered_gamma,
    )


def run_oracle(questions: list[tuple[Mode, tuple[str, ...]]]) -> list[dict[str, torch.Tensor]]:
    """For each (mode, layers): quantity -> tensor, on one rank."""
    return [OracleRun(mode, names).results() for mode, names in questions]
