"""Faults that are planted in the adapters of experts, each of which the comparisons with one rank notice."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist

import dora_fx
from benchmarks.collective_counts import CollectiveCounts, count_collectives
from dora_fx.function import placement, site_parameters
from dora_fx.megatron import wrappers
from dora_fx.modules import ParallelLinearDoRAAdapter
from dora_fx.modules.kinds.linear_kind import LocalExperts
from dora_fx.ranks import broadcast_object
from tests.closeness import assert_below, relative_error
from tests.distributed import pipeline_gpt
from tests.distributed.launch import run_layout
from tests.distributed.moe_layers import (
    DIM,
    EXPERTS,
    HIDDEN,
    ExpertLayout,
    MoE,
    adapted,
    batch,
    moe_config,
    oracle_step,
    own_tokens,
    step,
    tensors_of_sites,
)
from tests.distributed.moe_training import Mode, Training, oracle_training

# It alone needs the marks of parameters that `no_mark` leaves out: later versions count those of experts by themselves.
IS_OLD = megatron.core.__version__.startswith("0.16.")
ETP, APART, EP, BOTH = (
    ExpertLayout(2, tp=2, etp=2),
    ExpertLayout(2, tp=2),
    ExpertLayout(2, ep=2),
    ExpertLayout(2, tp=2, ep=2),
)


def allreduce_of_weights() -> None:
    """As megatron-core 0.16 sets it on weights: by the number of expert-parallel ranks alone."""
    right = LocalExperts.of
    LocalExperts.of = classmethod(  # type: ignore[method-assign, assignment]
        lambda cls, path, linear, group: replace(
            right(path, linear, group), allreduce=linear.config.expert_model_parallel_size == 1
        )
    )


def no_mark() -> None:
    def mark(self: Any, parameter: Any, *, is_shard: bool) -> None:
        parameter.allreduce = self.experts.allreduce

    ParallelLinearDoRAAdapter._mark_of_expert = mark  # type: ignore[method-assign]


def local_numbers() -> None:
    wrappers.first_local_expert = lambda experts: 0


def reduced_rows() -> None:
    placement.LAYOUTS["row_expert"] = replace(placement.LAYOUTS["row_expert"], leave="all_reduce")


def whole_magnitude_gradient() -> None:
    placement.Layout.magnitude_grad_is_partial = lambda self, dropout: False  # type: ignore[method-assign]


def norm_of_the_shard() -> None:
    site_parameters.reduce_from_group_coalesced = lambda tensors, group: tensors


def copied_tokens() -> None:
    placement.LAYOUTS["column_expert"] = replace(placement.LAYOUTS["column_expert"], enter="copy")


def dense_group_in_state_dicts() -> None:
    ParallelLinearDoRAAdapter.state_group = property(lambda self: self.tp_group)  # type: ignore[assignment]


Errors = dict[str, float]


def errors_of_a_step(layout: ExpertLayout) -> Errors:
    found, expected = step(adapted(MoE(moe_config(layout))), layout, 0, torch.float64), oracle_step(0)
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def errors_of_training(layout: ExpertLayout) -> Errors:
    mode = Mode()
    found, expected = Training(layout, mode).results(), oracle_training(mode.clip)
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def errors_of_initial_factors(layout: ExpertLayout) -> Errors:
    """1 where experts at the same place of two ranks start with the same factors, 0 elsewhere."""
    found = tensors_of_sites(adapted(MoE(moe_config(layout)), set_values=False))
    name = "expert {} linear_fc1 lora_a"
    return {
        f"experts {a} and {b}": float(torch.equal(found[name.format(a)], found[name.format(b)]))
        for a, b in ((0, 2), (1, 3))
    }


def errors_of_a_checkpoint(layout: ExpertLayout) -> Errors:
    """A saved checkpoint is loaded as it was."""
    sizes = pipeline_gpt.Layout(tp=layout.tp, ep=layout.ep, etp=layout.etp)
    kind = pipeline_gpt.Kind(experts=True, sequence_parallel=True)
    chunks = pipeline_gpt.attach(pipeline_gpt.build_base(sizes, kind, num_layers=1))
    pipeline_gpt.set_adapter_values(chunks, sizes)
    before = {name: parameter.clone() for name, parameter, _ in pipeline_gpt.trained_parameters(chunks)}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_object(own, dist.group.WORLD)) / "saved"
        dora_fx.save_checkpoint(chunks, folder)
        pipeline_gpt.set_adapter_values(chunks, sizes, " others")
        dora_fx.load_checkpoint(chunks, folder)
        dist.barrier()
    after = pipeline_gpt.trained_parameters(chunks)
    return {name: relative_error(parameter, before[name]) for name, parameter, _ in after}


MEASURES = [
    (ETP, errors_of_a_step),
    (APART, errors_of_training),
    (EP, errors_of_initial_factors),
    (BOTH, errors_of_a_checkpoint),
]
_ABOVE = r"^relative errors above 1\.0e-04: "
_MAGNITUDE = r"'d (expert \d|shared) linear_fc2 magnitude': [^,}]+"
# With a pattern of what notices each fault: a check of the library's or of the harness, or wrong numbers.
FAULTS: list[tuple[Callable[[], None], ExpertLayout, Callable[[ExpertLayout], Errors], str]] = [
    (
        dense_group_in_state_dicts,
        BOTH,
        errors_of_a_checkpoint,
        "the shards of the ranks do not add up to whole tensors",
    ),
    (allreduce_of_weights, APART, errors_of_training, r"^ranks differ in expert \d linear_fc1 lora_a$"),
    (local_numbers, EP, errors_of_initial_factors, _ABOVE + r"\{'experts 0 and 2': 1\.0, 'experts 1 and 3': 1\.0\}$"),
    # Attaching tries every layer.
    (reduced_rows, ETP, errors_of_a_step, r"^mlp\.experts\.\S+\.linear_fc2: .* whose outputs are off W0 x \+ bias by"),
    (copied_tokens, ETP, errors_of_a_step, _ABOVE + r"\{'dx': [^,]+\}$"),
    (whole_magnitude_gradient, ETP, errors_of_a_step, _ABOVE + rf"\{{{_MAGNITUDE}(, {_MAGNITUDE})*\}}$"),
    (norm_of_the_shard, ETP, errors_of_a_step, _ABOVE + r"\{'y': "),
    *([(no_mark, BOTH, errors_of_training, _ABOVE + r"\{'norm 0': ")] if IS_OLD else []),
]


def message_under(
    layout: ExpertLayout, plant: Callable[[], None], measure: Callable[[ExpertLayout], Errors]
) -> str | None:
    """What notices a fault says of it; None where nothing does."""
    plant()
    try:
        assert_below(measure(layout), 1e-4)
    except (AssertionError, ValueError, dora_fx.CheckpointError) as error:
        return str(error)
    return None


def identify(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("layout", "measure"), MEASURES, ids=identify)
def test_without_a_fault(layout: ExpertLayout, measure: Any) -> None:
    # Megatron takes norms of gradients in float32.
    assert_below(run_layout(measure, layout), 1e-6)


@pytest.mark.parametrize(
    ("fault", "layout", "measure", "message"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS]
)
def test_a_planted_fault_is_noticed(fault: Any, layout: ExpertLayout, measure: Any, message: str) -> None:
    found = run_layout(message_under, layout, fault, measure)
    assert found is not None and re.search(message, found), found


def count(layout: ExpertLayout) -> tuple[CollectiveCounts, CollectiveCounts]:
    """What an adapted layer sends beyond its base, and the base beyond it."""
    model = MoE(moe_config(layout, moe_shared_expert_intermediate_size=None)).requires_grad_(False)
    x = own_tokens(torch.cat([batch(0)] * 8), layout).requires_grad_()
    base = count_collectives(model, x)
    found = count_collectives(adapted(model), x)
    return found - base, base - found


# Bytes in float64: of A of linear_fc1 or B of linear_fc2, and of a number for each output of linear_fc2.
_FACTOR, _ROW = 8 * DIM * HIDDEN, 8 * HIDDEN
_OVER_TENSORS = CollectiveCounts(
    # A of column layers and B of row layers; squared norms of row layers, with their A A^T.
    once_per_step=Counter(
        {("all_gather", 2 * EXPERTS * _FACTOR): 1, ("all_reduce", EXPERTS * (_ROW + 8 * DIM * DIM)): 1}
    ),
    # The gradients of these factors, and of the magnitudes of row layers.
    backward=Counter({("reduce_scatter", _FACTOR): 2 * EXPERTS, ("all_reduce", _ROW): EXPERTS}),
)


@pytest.mark.parametrize(
    ("layout", "expected"), [(EP, CollectiveCounts()), (ETP, _OVER_TENSORS)], ids=["ep2", "tp2-etp2"]
)
def test_collectives_of_experts(layout: ExpertLayout, expected: CollectiveCounts) -> None:
    """EP adds none; over the expert-tensor group what is of a factor's size goes, and no activation."""
    added, missing = run_layout(count, layout)
    assert added == expected
    assert missing == CollectiveCounts()
