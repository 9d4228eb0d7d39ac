"""`DoRA`: which layers are adapted and how; calling it on a model attaches the adapters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import nn

from dora_fx.adapter import INIT_METHODS
from dora_fx.agreement import check_same_settings, value_of_first_rank, value_of_first_replica
from dora_fx.attach import AttachPlan, attach, check_targets_matched, plan_attachment, rebuild_gradient_buffers
from dora_fx.collectives import resolve_group
from dora_fx.dynamo import capture_megatron_whole
from dora_fx.layers import DoRALinear
from dora_fx.report import DoRAReport, report_on
from dora_fx.wrappers import ModelT, chunks_of

logger = logging.getLogger(__name__)


@dataclass
class DoRA:
    """Weight-decomposed low-rank adaptation (arXiv 2402.09353) of a Megatron model.

    Call it on a model to freeze the base and wrap every target in place:

        dora = DoRA(target_modules=["linear_qkv", "linear_proj"], dim=16, alpha=32)
        model = dora(model)

    Args:
        target_modules: module names (`linear_qkv`), full paths, or patterns over full paths in which `*`
            stands for any text (`*.layers.0.*.linear_qkv`). A name or path must be a linear layer; a
            pattern adapts the linear layers among what it matches. Layers have their numbers in the whole model,
            whatever the pipeline size.
        exclude_modules: names, paths or patterns that are never adapted.
        dim: rank of the low-rank product.
        alpha: the product is scaled by alpha / dim.
        dropout: probability of dropping an element of a layer's input, in [0, 1), in training.
        dropout_position: "pre"; the reference accepts no other for DoRA either.
        lora_A_init_method, lora_B_init_method: "xavier", "normal" (std 0.2), "kaiming" or "zero".
        allow_unmatched: log a warning for a target that matches nothing, in place of an error.

    Raises:
        ValueError: for a field out of its range, naming the value found and the values expected.

    Attributes:
        report: after a call, what was adapted; `print(dora.report)` shows it as a table.
    """

    target_modules: Sequence[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    exclude_modules: Sequence[str] = field(default_factory=list)
    dim: int = 32
    alpha: float = 64
    dropout: float = 0.0
    dropout_position: Literal["pre"] = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    allow_unmatched: bool = False
    report: DoRAReport | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"DoRA.{name}: found {value!r}, expected a list of names")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim <= 0:
            raise ValueError(f"DoRA.dim: found {self.dim!r}, expected a positive integer")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"DoRA.alpha: found {self.alpha!r}, expected a positive finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"DoRA.dropout: found {self.dropout!r}, expected a probability in [0, 1)")
        if self.dropout_position != "pre":
            raise ValueError(f"DoRA.dropout_position: found {self.dropout_position!r}, expected 'pre'")
        for name in ("lora_A_init_method", "lora_B_init_method"):
            if getattr(self, name) not in INIT_METHODS:
                raise ValueError(f"DoRA.{name}: found {getattr(self, name)!r}, expected one of {sorted(INIT_METHODS)}")

    def __call__(self, model: ModelT, training: bool = True) -> ModelT:
        """Freeze the base, wrap the targets in place and return the model that was given.

        Everything is checked before anything is changed. A second call with the same settings changes
        nothing. Every rank calls it; a pipeline stage may have no target.

        Args:
            model: a model, or a list or a tuple of model chunks, bare or wrapped: by torch.compile, activation
                checkpointing, Megatron's Float16Module or DistributedDataParallel, which gets new gradient buffers,
                so build optimizers afterwards. Wrapping before or after gives the same paths and initial factors.
            training: put the model in training mode with trainable adapters. False freezes them too and
                puts the model in evaluation mode.

        Raises:
            ValueError: no module matched a target, a base weight is not finite or not floating point, `dim` is
                not a multiple of the tensor-parallel size, the model was adapted with other settings, the
                tensor-parallel ranks differ in settings or sites, data parallelism overlaps its parameter gather
                with the forward pass, torch's DistributedDataParallel is around the model already, or FSDP shards it.
            TypeError: a target is not a linear layer or is of a class that is not supported.
        """
        # Fields may have been set since construction.
        self._check()
        chunks = chunks_of(model)
        plan = plan_attachment(self, chunks)
        check_targets_matched(self, chunks, plan)
        seed = self._agree(plan)
        capture_megatron_whole()
        self._freeze(chunks)
        attach(self, plan, seed)
        for chunk in chunks:
            chunk.train(training)
            if not training:
                chunk.requires_grad_(False)
        rebuild_gradient_buffers(chunks)
        self.report = report_on(chunks, plan.unmatched_linears)
        logger.info("%s", self.report)
        return model

    def _freeze(self, chunks: Iterable[nn.Module]) -> None:
        """Freeze all but adapters; those of an earlier call, perhaps with other targets, train on."""
        for chunk in chunks:
            sites = [module for module in chunk.modules() if isinstance(module, DoRALinear)]
            adapters = {id(parameter) for site in sites for parameter in site.adapter.parameters()}
            for parameter in chunk.parameters():
                parameter.requires_grad_(id(parameter) in adapters)

    def _agree(self, plan: AttachPlan) -> int:
        """Compare configuration and sites with the other tensor-parallel ranks; return one seed for all ranks."""
        seed = value_of_first_replica(torch.initial_seed())
        for tp_group in dict.fromkeys(site.tp_group for site in plan.new if site.tp_group):
            group = resolve_group(tp_group)
            settings = {f"DoRA.{field.name}": getattr(self, field.name) for field in fields(self) if field.init}
            sites = {site.path: (site.layout.name, site.in_features, site.out_features) for site in plan.new}
            check_same_settings({**settings, **sites}, group)
            seed = value_of_first_rank(seed, group)
        return seed
