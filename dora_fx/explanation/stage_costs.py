"""Costs of one pipeline stage: its layers and the model's ends, what a step has once, and the memory of a rank."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dora_fx.explanation.collective_calls import CollectiveRecorder
from dora_fx.explanation.cost_records import (
    VARIANTS,
    Collective,
    KindCosts,
    LayerCosts,
    Memory,
    StageCosts,
    StageVariant,
    StepCosts,
)
from dora_fx.explanation.fake_stage import FakeStage
from dora_fx.explanation.graph_costs import bytes_of, counted, in_order, layer_costs
from dora_fx.explanation.layer_capture import LayerInputs, capture
from dora_fx.explanation.layer_kinds import LayerKind, capture_kind, layer_kinds
from dora_fx.explanation.planned_run import PlannedRun
from dora_fx.explanation.variants import passes_of
from dora_fx.function import complete_parameters
from dora_fx.modules import DoRALinear, complete, disable_adapter, sites_of

_MOMENT_BYTES, _MAIN_COPY_BYTES = 8, 4


@dataclass(frozen=True)
class MeasuredKind:
    """A kind of layer with its costs, and what a step has once for one such layer.

    Attributes:
        count: layers of the stage.
        steps: in each variant; collectives that complete gradients are those over tensor-parallel ranks.
    """

    costs: KindCosts
    count: int
    steps: dict[str, StepCosts]


def measured_layers(stage: FakeStage, run: PlannedRun) -> list[MeasuredKind]:
    """Count one layer of each kind of a stage, in every variant."""
    return [_measured_layer(kind, stage, run) for kind in layer_kinds(stage.model)]


def _measured_layer(kind: LayerKind, stage: FakeStage, run: PlannedRun) -> MeasuredKind:
    sites = sites_of(kind.layer)
    trained = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
    costs: dict[str, LayerCosts] = {}
    steps: dict[str, StepCosts] = {}
    refresh_flops, refresh = _refresh_costs(sites)
    # Norms are all that is reduced in a refresh; factors are gathered.
    gathers = tuple(one for one in refresh if one.kind == "all_gather")
    for variant in VARIANTS:
        with disable_adapter(kind.layer) if variant == "base" else contextlib.nullcontext():
            costs[variant] = layer_costs(capture_kind(kind, stage.model, run, passes_of(variant)))
        with CollectiveRecorder() as recorder:
            # The backward pass that was captured left the layer's partial sums.
            complete(trained)
        of_refresh = {"base": (0, ()), "lora": (0, gathers), "dora": (refresh_flops, refresh)}[variant]
        steps[variant] = StepCosts(*of_refresh, counted(recorder.calls))
    frozen, factors, magnitudes = _parameter_counts(kind.layer)
    return MeasuredKind(KindCosts(kind.name, frozen, factors, magnitudes, costs), kind.count, steps)


def _refresh_costs(sites: list[DoRALinear]) -> tuple[int, tuple[Collective, ...]]:
    """Count what brings the norms and gathered factors of a layer up to date."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, CollectiveRecorder() as recorder:
        complete_parameters([site.cached_site().stored for site in sites])
    return int(flops.get_total_flops()), counted(recorder.calls)


def measured_ends(stage: FakeStage, run: PlannedRun) -> list[MeasuredKind]:
    """Count the embedding and the output layer with its loss, where the stage has them; both are the base's.

    Raises:
        ValueError: the output layer is adapted.
    """
    model, length = stage.model, run.sequence_length
    tokens = torch.zeros(run.batch_size, length, dtype=torch.int64)
    ends = []
    if model.pre_process:
        ends.append(_measured_end("embedding", model.embedding, LayerInputs(tokens, {"position_ids": tokens}), []))
    if model.post_process:
        rows = length // run.tp if model.config.sequence_parallel else length
        shape = (rows, run.batch_size, model.config.hidden_size)
        hidden = torch.empty(shape, dtype=model.config.params_dtype, requires_grad=True)
        parts = [model.decoder.final_layernorm, model.output_layer]
        ends.append(_measured_end("output", _Head(model), LayerInputs(hidden, {"labels": tokens}), parts))
    return ends


class _Head(nn.Module):
    """The last norm, the output layer and the loss of a GPTModel."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.output_layer = model.decoder.final_layernorm, model.output_layer
        self.tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        self.loss = [model.compute_language_model_loss]

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits, _ = self.output_layer(self.norm(hidden), weight=self.tied)
        loss: Tensor = self.loss[0](labels, logits)
        return loss


def _measured_end(name: str, module: nn.Module, inputs: LayerInputs, parts: list[nn.Module]) -> MeasuredKind:
    for site in sites_of(module):
        raise ValueError(f"target_modules: found {site.path}, expected layers of the decoder alone to be adapted")
    # Nothing is adapted in it, so that all variants are the base's.
    costs = dict.fromkeys(VARIANTS, layer_costs(capture(module, inputs, passes_of("base"))))
    frozen = sum(_parameter_counts(part)[0] for part in parts or [module])
    nothing = dict.fromkeys(VARIANTS, StepCosts(0, (), ()))
    return MeasuredKind(KindCosts(name, frozen, 0, 0, costs), 1, nothing)


def stage_costs(
    number: int, stage: FakeStage, layers: list[MeasuredKind], ends: list[MeasuredKind], run: PlannedRun
) -> StageCosts:
    """Add up a stage: its layers, the ends that it has, and what is between it and its neighbours.

    Args:
        number: of the stage.
        stage: a stage with as many layers; those between the first and the last are described by any other's.
        layers: counted in any stage.
        ends: those that this stage has.
        run: the layout.
    """
    kinds = [*layers, *ends]
    variants = {variant: _stage_variant(variant, number, stage, kinds, run) for variant in VARIANTS}
    return StageCosts(number, {kind.costs.name: kind.count for kind in kinds}, run.in_flight(number), variants)


def _stage_variant(
    variant: str, number: int, stage: FakeStage, kinds: list[MeasuredKind], run: PlannedRun
) -> StageVariant:
    found: Counter[tuple[Any, ...]] = Counter()
    for kind in kinds:
        of_layer = kind.costs.variants[variant]
        _add(found, (*of_layer.forward.collectives, *of_layer.backward.collectives), kind.count)
    _add(found, between_stages(number, stage, run), 1)
    step = _step_costs(variant, stage, kinds, run)
    flops = sum(kind.count * kind.costs.variants[variant].flops for kind in kinds)
    return StageVariant(
        memory=_memory(variant, number, stage, kinds, run),
        micro_batch=in_order(found),
        step=step,
        flops_per_step=flops * run.micro_batches + step.refresh_flops,
    )


def _add(found: Counter[tuple[Any, ...]], collectives: tuple[Collective, ...], times: int) -> None:
    for one in collectives:
        found[one.kind, one.num_bytes, one.group, one.num_ranks, one.site] += one.count * times


def between_stages(number: int, stage: FakeStage, run: PlannedRun) -> tuple[Collective, ...]:
    """Return the messages of one micro-batch with the stages before and behind: hidden states, and their gradients."""
    neighbours = (number > 0) + (number < run.pp - 1)
    if not neighbours:
        return ()
    config = stage.model.config
    rows = run.sequence_length // run.tp if config.sequence_parallel else run.sequence_length
    num_bytes = rows * run.batch_size * config.hidden_size * config.params_dtype.itemsize
    return tuple(Collective(kind, num_bytes, neighbours, "pp", run.pp) for kind in ("receive", "send"))


def _step_costs(variant: str, stage: FakeStage, kinds: list[MeasuredKind], run: PlannedRun) -> StepCosts:
    refresh: Counter[tuple[Any, ...]] = Counter()
    gradients: Counter[tuple[Any, ...]] = Counter()
    # A step completes the sums of all layers in one message of each kind.
    joined: Counter[tuple[Any, ...]] = Counter()
    for kind in kinds:
        _add(refresh, kind.steps[variant].refresh, kind.count)
        for one in kind.steps[variant].gradients:
            joined[one.kind, one.group, one.num_ranks, one.site] += one.num_bytes * one.count * kind.count
    for (name, group, ranks, site), num_bytes in joined.items():
        gradients[name, num_bytes, group, ranks, site] += 1
    replicas = {"dp": run.dp, "edp": run.tp * run.dp // (run.ep * run.expert_tensor_parallel)}
    for num_bytes, group in _gradient_buffers(stage, variant):
        if replicas[group] > 1:
            gradients["all_reduce", num_bytes, group, replicas[group], ""] += 1
    flops = sum(kind.count * kind.steps[variant].refresh_flops for kind in kinds)
    return StepCosts(flops, in_order(refresh), in_order(gradients))


def _gradient_buffers(stage: FakeStage, variant: str) -> list[tuple[int, str]]:
    """Bytes of each of Megatron's gradient buffers, and the group of the replicas that add it up."""
    magnitudes = {id(site.adapter.weight_magnitude) for site in sites_of(stage.model)}
    left_out = {"base": lambda p: True, "lora": lambda p: id(p) in magnitudes, "dora": lambda p: False}[variant]
    wrapper = stage.wrapper
    sizes = [
        (sum(bytes_of(parameter.main_grad) for parameter in buffer.params if not left_out(parameter)), group)
        for group, buffers in (("dp", wrapper.buffers), ("edp", wrapper.expert_parallel_buffers))
        for buffer in buffers
    ]
    return [(size, group) for size, group in sizes if size]


def _memory(variant: str, number: int, stage: FakeStage, kinds: list[MeasuredKind], run: PlannedRun) -> Memory:
    sites = sites_of(stage.model) if variant != "base" else []
    trained = [p for site in sites for p in _trained(site, variant)]
    narrow = sum(p.numel() for p in trained if p.dtype.itemsize < 4)
    saved = sum(kind.count * kind.costs.variants[variant].saved_bytes for kind in kinds)
    base_bytes = sum(kind.count * kind.costs.base_parameters for kind in kinds) * run.torch_dtype.itemsize
    return Memory(
        base=base_bytes,
        adapters=sum(map(bytes_of, trained)),
        cached=sum(bytes_of(_cached(site, variant)) for site in sites),
        gradients=sum(size for size, _ in _gradient_buffers(stage, variant)),
        partial_sums=_partial_sums(kinds, variant),
        optimizer=sum(p.numel() for p in trained) * _MOMENT_BYTES + narrow * _MAIN_COPY_BYTES,
        activations=saved * run.in_flight(number),
        transient=max(kind.costs.variants[variant].transient_bytes for kind in kinds),
    )


def _partial_sums(kinds: list[MeasuredKind], variant: str) -> int:
    """Bytes of the sums that a step completes; each message is as large as the sums in it."""
    return sum(kind.count * one.count * one.num_bytes for kind in kinds for one in kind.steps[variant].gradients)


def _trained(site: DoRALinear, variant: str) -> Iterator[Tensor]:
    adapter = site.adapter
    yield from (adapter.linear_in.weight, adapter.linear_out.weight)
    if variant == "dora":
        yield adapter.weight_magnitude


def _cached(site: DoRALinear, variant: str) -> list[Tensor]:
    """Buffers of a site: gathered factors, and for DoRA scales and norms as well."""
    cached = site.cached_parameters()
    factors = [cached.lora_a, cached.lora_b]
    tensors = factors if variant == "lora" else [*factors, *cached.scale, site.base_norm_sq]
    return [tensor for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)]


def _parameter_counts(module: nn.Module) -> tuple[int, int, int]:
    """Return elements of a module on this rank: frozen, in low-rank factors, and magnitudes."""
    sites = sites_of(module)
    magnitudes = sum(site.adapter.weight_magnitude.numel() for site in sites)
    factors = sum(parameter.numel() for site in sites for parameter in _trained(site, "lora"))
    frozen = sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
    return frozen, factors, magnitudes
