"""`explain`: the costs of a whole run, of every pipeline stage in every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from torch import nn

from dora_fx.explanation.cost_records import Explanation, StageCosts
from dora_fx.explanation.fake_stage import fake_stage, stage_of_model
from dora_fx.explanation.named_shapes import architecture_named
from dora_fx.explanation.planned_run import RUN_FIELDS, PlannedRun
from dora_fx.explanation.stage_costs import MeasuredKind, measured_ends, measured_layers, stage_costs
from dora_fx.models import GPTArchitecture


def explain(base: str | Path | GPTArchitecture | Any, run: PlannedRun | None = None, **options: Any) -> Explanation:
    """Say what a run with DoRA costs beside LoRA of the same rank and the frozen base, before it runs.

    Nothing is loaded and nothing computed: one layer of each kind goes through Dynamo, the passes and AOTAutograd on
    tensors without values, in a world whose other ranks do not exist, and what is in its graphs is counted. It takes
    one CPU. But for a model of yours, no process group may exist.

    Args:
        base: a name of `NAMED_SHAPES`, a Hugging Face folder or its config.json, a GGUF file, a transformers config,
            or an architecture, of which no weights are read; or a Megatron model of yours that was built under
            FakeTensorMode within Megatron's groups, which are those of the run. Without adapters it has some until
            this returns; with adapters, these are counted, and the targets are not read.
        run: layout, batches and adapters; by default made of `options`.
        options: fields of `PlannedRun`, such as `tp=8, pp=4, dp=32, sequence_parallel=True`.

    Returns:
        records per kind of layer and pipeline stage, for one rank.

    Raises:
        ValueError: naming the option, for a value out of its range, an unknown base or option, or a layout that cannot
            share the base equally; before anything is built. Also as `DoRA` raises for targets.
        TypeError: a model is none of Megatron's.
        FileNotFoundError, UnsafeFileError, UnsupportedModelError: as from `load_hf_config`.
    """
    run = _planned(run, options)
    if isinstance(base, nn.Module):
        num_experts = getattr(getattr(base, "config", None), "num_moe_experts", None) or 0
        layers, ends, stages = _of_model(base, run)
    else:
        architecture = architecture_named(base)
        num_experts = architecture.num_experts
        layers, ends, stages = _of_architecture(architecture, run)
    return Explanation(
        base=base if isinstance(base, str) else str(getattr(base, "name_or_path", None) or type(base).__name__),
        run=run,
        kinds=tuple(kind.costs for kind in (*layers, *ends)),
        stages=tuple(stages),
        num_experts=num_experts,
        torch=torch.__version__,
        megatron_core=megatron.core.__version__,
    )


_Costs = tuple[list[MeasuredKind], list[MeasuredKind], list[StageCosts]]


def _of_architecture(architecture: GPTArchitecture, run: PlannedRun) -> _Costs:
    run.check_fits(architecture)
    layers: list[MeasuredKind] = []
    ends: list[MeasuredKind] = []
    stages: list[StageCosts] = []
    for number in dict.fromkeys((0, run.pp - 1)):
        with fake_stage(architecture, run, number) as stage:
            layers = layers or measured_layers(stage, run)
            own_ends = measured_ends(stage, run)
            ends += own_ends
            stages.append(stage_costs(number, stage, layers, own_ends, run))
            if number == 0:
                # Stages between the first and the last have layers alone, as many as the first.
                stages += [stage_costs(middle, stage, layers, [], run) for middle in range(1, run.pp - 1)]
    return layers, ends, stages


def _of_model(model: Any, run: PlannedRun) -> _Costs:
    """Count a user's model, which is one stage."""
    with stage_of_model(model, run) as stage:
        layers, ends = measured_layers(stage, run), measured_ends(stage, run)
        number = parallel_state.get_pipeline_model_parallel_rank()
        return layers, ends, [stage_costs(number, stage, layers, ends, run)]


def _planned(run: PlannedRun | None, options: dict[str, Any]) -> PlannedRun:
    if run is not None:
        if options:
            raise ValueError(f"explain: found both run and {', '.join(options)}, expected one of them")
        return run
    unknown = [name for name in options if name not in RUN_FIELDS]
    if unknown:
        raise ValueError(f"explain: found the options {unknown}, expected fields of PlannedRun: {list(RUN_FIELDS)}")
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    return PlannedRun(**{**options, **lists})
