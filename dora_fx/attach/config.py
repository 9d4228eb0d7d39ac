"""`DoRA`: which layers are adapted and how; calling it on a model attaches the adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from dora_fx.attach.attach_report import DoRAReport, report_on
from dora_fx.attach.experts import check_experts, check_same_on_expert_ranks
from dora_fx.attach.first_step import watch_first_step
from dora_fx.attach.frozen_experts import freeze_router_bias
from dora_fx.attach.latent_attention import warn_of_approximate_backward
from dora_fx.attach.matching import adapted_layers
from dora_fx.attach.plan import AttachPlan, attach, check_targets_matched, plan_attachment
from dora_fx.attach.probe import try_layers
from dora_fx.attach.settings import DoRASettings
from dora_fx.megatron import ModelT, chunks_of, data_parallel_around, rebuild_gradient_buffers
from dora_fx.modules import DoRALinear, inactive_adapters
from dora_fx.ranks import broadcast_object, check_same_settings, of_all_parts, resolve_group, value_of_first_replica

logger = logging.getLogger(__name__)


@dataclass
class DoRA(DoRASettings):
    """Weight-decomposed low-rank adaptation (arXiv 2402.09353) of a Megatron or transformers model.

    Call it on a model to freeze the base and wrap every target in place:

        dora = DoRA(target_modules=["linear_qkv", "linear_proj"], dim=16, alpha=32)
        model = dora(model)

    Args:
        target_modules: module names (`linear_qkv`), full paths, or patterns over full paths in which `*`
            stands for any text (`*.layers.0.*.linear_qkv`). A name or path must be a linear layer; a
            pattern adapts the linear layers among what it matches. Layers are numbered as in the whole model, at every
            pipeline size. "all-linear" is, as in PEFT, every linear layer but the output layer and the
            head of a sequence classifier.
        exclude_modules: names, paths or patterns that are never adapted.
        dim: rank of the low-rank product.
        alpha: the product is scaled by alpha / dim, or by alpha / sqrt(dim) with `use_rslora`.
        dropout: probability of dropping an element of a layer's input, in [0, 1), in training.
        dropout_position: "pre"; the reference refuses others for DoRA too.
        lora_A_init_method, lora_B_init_method: "xavier", "normal" (std 0.2), "kaiming" or "zero".
        allow_unmatched: log a warning for a target that matches nothing, or a pattern that decides for no layer, in
            place of an error.
        rank_pattern, alpha_pattern: other ranks and alphas by names, paths or patterns as in `target_modules`; of
            several that match a layer the first is used, as in PEFT.
        use_rslora: scale by alpha / sqrt(dim) (rsLoRA, arXiv 2312.03732).
        complete_gradients: when gradients that are partial sums on each tensor-parallel rank are completed.
            "every_backward": each backward pass leaves complete ones. "once_per_step": they are added up over
            micro-batches, and completed when Megatron's DistributedDataParallel, which must be around the model, starts
            to reduce them over data-parallel ranks, in `finalize_model_grads` at the latest. That sends one message a
            step in place of one per micro-batch, and needs memory for the sums: dim * in numbers for a column layer,
            out * dim for a row layer. Layers that are whole on every rank keep "every_backward". If an optimizer steps
            before the sums are complete, PartialGradientsError is raised. "auto" is "once_per_step" under that wrapper
            and "every_backward" elsewhere.

    Raises:
        ValueError: for a field out of its range, naming the value found and the values expected.

    Attributes:
        report: after a call, what was adapted; `print(dora.report)` shows it as a table.
    """

    report: DoRAReport | None = field(default=None, init=False, repr=False, compare=False)

    @torch.inference_mode(False)
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
            ValueError: no module matched a target, a base weight is not finite or not floating point, a layer does not
                compute what its kind and weight describe (`attach/probe.py`), a rank is not a multiple of the
                tensor-parallel size, the model was adapted with other settings, the tensor-parallel ranks differ in
                settings or sites, data parallelism overlaps its parameter gather with the forward pass, torch's
                DistributedDataParallel is around the model already, or FSDP shards it.
            TypeError: a target is not a linear layer or is of a class that is not supported.
        """
        # Fields may have been set since the constructor checked them.
        self._check()
        chunks = chunks_of(model)
        plan = self._plan_on_all_parts(chunks)
        check_targets_matched(self, chunks, plan)
        _check_buffers_are_of_one_adapter(chunks, plan)
        seed = self._agree(plan)
        try_layers(plan.new)
        self._freeze(chunks)
        attach(self, plan, seed)
        for chunk in chunks:
            chunk.train(training)
            if not training:
                chunk.requires_grad_(False)
        if plan.new or not training:
            rebuild_gradient_buffers(chunks)
        warn_of_approximate_backward(chunks)
        if plan.new:
            watch_first_step({named.whole_path: named.module for _, named in adapted_layers(chunks)})
        self.report = report_on(chunks, plan.unmatched_linears)
        logger.info("%s", self.report)
        return model

    def _plan_on_all_parts(self, chunks: Sequence[nn.Module]) -> AttachPlan:
        """Plan and check; where a rank finds a problem, those of other stages and with other experts raise too."""
        found: TypeError | ValueError | None = None
        try:
            plan = plan_attachment(self, chunks)
            check_experts(self, chunks, plan.new)
        except (TypeError, ValueError) as error:
            found = error
        problems = of_all_parts(None if found is None else str(found))
        if found is not None:
            raise found
        if problem := next((each for each in problems if each is not None), None):
            raise ValueError(problem)
        return plan

    def _freeze(self, chunks: Iterable[nn.Module]) -> None:
        """Freeze all parameters but adapters'; those of an earlier call, perhaps with other targets, stay trainable."""
        for chunk in chunks:
            freeze_router_bias(chunk)
            sites = [module for module in chunk.modules() if isinstance(module, DoRALinear)]
            adapters = {id(parameter) for site in sites for parameter in site.adapter.parameters()}
            for parameter in chunk.parameters():
                parameter.requires_grad_(id(parameter) in adapters)

    def _agree(self, plan: AttachPlan) -> int:
        """Compare configuration and sites with the other ranks of a model; return one seed for all ranks."""
        seed = value_of_first_replica(torch.initial_seed())
        settings = {f"DoRA.{field.name}": getattr(self, field.name) for field in fields(self) if field.init}
        check_same_on_expert_ranks(settings, plan.new)
        for tp_group in dict.fromkeys(site.spec.tp_group_name for site in plan.new if site.spec.tp_group_name):
            group = resolve_group(tp_group)
            # Ranks of the dense layers' group may hold other experts.
            sites = {
                site.path: (site.spec.layout.name, site.spec.in_features, site.spec.out_features)
                for site in plan.new
                if site.spec.tp_group_name == tp_group
            }
            check_same_settings({**settings, **sites}, group)
            seed = broadcast_object(seed, group)
        return seed


def _check_buffers_are_of_one_adapter(chunks: Sequence[nn.Module], plan: AttachPlan) -> None:
    """Raise ValueError where new gradient buffers would be made for the active one of several adapters alone."""
    if plan.new and (others := inactive_adapters(chunks)) and (wrappers := data_parallel_around(chunks)):
        raise ValueError(
            f"{plan.new[0].path}: found adapters {others} and {type(wrappers[0]).__name__} around "
            "the model, expected no new layer of an adapter: buffers would be made anew for one adapter alone"
        )
