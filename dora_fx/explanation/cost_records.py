"""The records of an explanation, from one tensor or message up to the whole run; JSON is their fields.

Sizes are bytes and counts are those of one rank. The three variants of a run are the frozen base, LoRA of the same
rank and DoRA; LoRA's layers are DoRA's without magnitudes and norms.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from dora_fx.explanation.planned_run import PlannedRun

VARIANTS = ("base", "lora", "dora")


@dataclass(frozen=True)
class Collective:
    """Equal messages that a rank sends.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all_single" of tokens between experts' ranks, or
            "send" and "receive" between pipeline stages.
        num_bytes: of the larger side of one message.
        count: how many there are.
        group: "tp", "dp", "pp" or "cp", of experts "ep", "etp" or "edp", or the name of another process group.
        num_ranks: of that group.
        site: path of the module in the layer that they belong to; empty where they serve several.
    """

    kind: str
    num_bytes: int
    count: int
    group: str
    num_ranks: int
    site: str = ""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that a forward pass keeps for its backward pass.

    Attributes:
        name: of its node in the forward graph.
        site: path of the module in the layer that makes it; empty for the layer's input.
    """

    name: str
    site: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class PassCosts:
    """One forward or backward pass of one layer over one micro-batch.

    Attributes:
        flops: floating-point operations of products and attention, as torch counts them.
        collectives: in the order of their sizes.
        peak_bytes: the most memory that the pass has allocated at once, by Inductor's own estimate for its schedule.
            In a backward pass that includes what was saved for it.
    """

    flops: int
    collectives: tuple[Collective, ...]
    peak_bytes: int


@dataclass(frozen=True)
class LayerCosts:
    """One layer in one variant, of one micro-batch.

    Attributes:
        forward, backward: its passes; the second has zeros where nothing needs a gradient.
        saved: what is kept for the backward pass, the largest first.
    """

    forward: PassCosts
    backward: PassCosts
    saved: tuple[SavedTensor, ...]

    @property
    def saved_bytes(self) -> int:
        """Bytes of everything saved."""
        return sum(tensor.num_bytes for tensor in self.saved)

    @property
    def flops(self) -> int:
        """Operations of both passes."""
        return self.forward.flops + self.backward.flops

    @property
    def transient_bytes(self) -> int:
        """What the layer needs at its worst moment beyond what it has saved."""
        kept = sum(tensor.num_bytes for tensor in self.saved if tensor.site)
        return max(self.forward.peak_bytes, self.backward.peak_bytes) - kept


@dataclass(frozen=True)
class KindCosts:
    """Layers of one kind, or one of the model's ends.

    Attributes:
        name: "layer", or "layer kind N" of several, "embedding" or "output".
        base_parameters, lora_parameters, magnitudes: elements in one layer on this rank.
        variants: the layer's costs in each of `VARIANTS`.
    """

    name: str
    base_parameters: int
    lora_parameters: int
    magnitudes: int
    variants: dict[str, LayerCosts]


@dataclass(frozen=True)
class StepCosts:
    """What a step has once, beside its micro-batches, for all layers of a stage.

    Attributes:
        refresh_flops: of norms; zero for LoRA and the base.
        refresh: collectives that gather factors and complete norms, before the first forward pass.
        gradients: collectives that complete partial sums over tensor-parallel ranks and add up replicas' gradients.
    """

    refresh_flops: int
    refresh: tuple[Collective, ...]
    gradients: tuple[Collective, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in one variant.

    Attributes:
        base: frozen parameters.
        adapters: trained parameters.
        cached: norms, scales and gathered factors, computed once per step.
        gradients: Megatron's buffers of gradients.
        partial_sums: gradients that are added up on each tensor-parallel rank until the step's end.
        optimizer: AdamW's two moments, and float32 copies of 16-bit parameters.
        activations: saved for backward passes, of all micro-batches in flight.
        transient: at the worst moment of the worst layer, beyond what is saved.
    """

    base: int
    adapters: int
    cached: int
    gradients: int
    partial_sums: int
    optimizer: int
    activations: int
    transient: int

    @property
    def peak(self) -> int:
        """The sum of all of it."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class StageVariant:
    """One pipeline stage in one variant, on one rank.

    Attributes:
        memory: its parts; their sum is the estimated peak.
        micro_batch: collectives of one micro-batch, forward and backward, those between stages included.
        step: what a step has once.
        flops_per_step: of all micro-batches and of what a step has once.
    """

    memory: Memory
    micro_batch: tuple[Collective, ...]
    step: StepCosts
    flops_per_step: int


@dataclass(frozen=True)
class StageCosts:
    """One pipeline stage.

    Attributes:
        stage: its number, from 0.
        kinds: how many layers of each kind it has.
        in_flight: for how many micro-batches it keeps activations at once.
        variants: in each of `VARIANTS`.
    """

    stage: int
    kinds: dict[str, int]
    in_flight: int
    variants: dict[str, StageVariant]

    @property
    def peak(self) -> int:
        """Estimated peak with DoRA, in bytes."""
        return self.variants["dora"].memory.peak


@dataclass(frozen=True)
class Explanation:
    """What a run costs per rank, before it runs; `print` shows the peaks, and `dora-fx explain` tables.

    Attributes:
        base: as it was named.
        run: the layout, batches and adapters.
        kinds: kinds of layers and the model's ends, of the whole model.
        stages: the pipeline stages; those between the first and the last are alike but for the micro-batches in flight.
        num_experts: of each layer, to which tokens are taken to be spread evenly; 0 without any.
        torch, megatron_core: versions that made the graphs.
    """

    base: str
    run: PlannedRun
    kinds: tuple[KindCosts, ...]
    stages: tuple[StageCosts, ...]
    num_experts: int
    torch: str
    megatron_core: str

    @property
    def largest_stage(self) -> StageCosts:
        """The stage with the largest estimated peak."""
        return max(self.stages, key=lambda stage: stage.peak)

    def fits(self, memory: int) -> bool:
        """Return whether the estimated peak of every stage is within so many bytes."""
        return self.largest_stage.peak <= memory

    def as_dict(self) -> dict[str, Any]:
        """Return the records as dictionaries, with the sums that are made of them."""
        return {**_plain(self), "largest_stage": self.largest_stage.stage}

    def to_json(self) -> str:
        """Return `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        run = self.run
        lines = [f"{self.base}: tp {run.tp}, pp {run.pp}, dp {run.dp}; estimated peak of a rank in GiB"]
        for stage in self.stages:
            peaks = (f"{name} {stage.variants[name].memory.peak / 2**30:.3f}" for name in VARIANTS)
            lines.append(f"stage {stage.stage}, {stage.in_flight} micro-batches in flight: {', '.join(peaks)}")
        return "\n".join(lines)


# Sums that JSON has beside the fields they are made of.
_SUMS: dict[type, tuple[str, ...]] = {
    LayerCosts: ("saved_bytes", "flops", "transient_bytes"),
    Memory: ("peak",),
    StageCosts: ("peak",),
}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in (*names, *_SUMS.get(type(value), ()))}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
