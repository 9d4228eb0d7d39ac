"""Faults that are planted in the adapters of experts, each of which the comparisons with one rank notice."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import dora_fx
from dora_fx.function import placement, site_parameters
from dora_fx.megatron import wrappers
from dora_fx.modules import ParallelLinearDoRAAdapter
from dora_fx.modules.kinds.linear_kind import LocalExperts
from dora_fx.ranks import broadcast_object
from tests.closeness import relative_error
from tests.distributed import pipeline_gpt
from tests.distributed.launch import run_layout
from tests.distributed.moe_layers import (
    FFN,
    HIDDEN,
    TRAINED,
    Layout,
    Mode,
    MoE,
    Training,
    adapted,
    batch,
    moe_config,
    oracle_step,
    oracle_training,
    own_tokens,
    step,
    tensors_of_sites,
)

slow = pytest.mark.slow
IS_OLD = megatron.core.__version__.startswith("0.16.")
ETP, APART, EP = Layout(2, tp=2, etp=2), Layout(2, tp=2), Layout(2, ep=2)


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


def nothing() -> None:
    """No fault: what is compared is right."""


def worst_of_a_step(layout: Layout) -> float:
    found, expected = step(adapted(MoE(moe_config(layout))), layout, 0, torch.float64), oracle_step(0)
    return max(relative_error(found[name], value) for name, value in expected.items())


def worst_of_training(layout: Layout) -> float:
    mode = Mode()
    found, expected = Training(layout, mode).results(), oracle_training(mode.clip)
    return max(relative_error(value, expected[name]) for name, value in found.items())


def worst_of_initial_factors(layout: Layout) -> float:
    """All experts at their places have other factors than those of one rank."""
    model = adapted(MoE(moe_config(layout)), set_values=False)
    found = tensors_of_sites(model)
    same = [
        torch.equal(found[f"expert {a} linear_fc1 lora_a"], found[f"expert {b} linear_fc1 lora_a"])
        for a, b in ((0, 2), (1, 3))
    ]
    return float(any(same))


def worst_of_a_checkpoint(layout: Layout) -> float:
    """A saved checkpoint is loaded as it was."""
    sizes = pipeline_gpt.Layout(tp=layout.tp, ep=layout.ep, etp=layout.etp)
    kind = pipeline_gpt.Kind(experts=True, sequence_parallel=True)
    chunks = pipeline_gpt.attach(pipeline_gpt.build_base(sizes, kind, num_layers=1))
    pipeline_gpt.set_adapter_values(chunks, sizes)
    before = [parameter.clone() for _, parameter, _ in pipeline_gpt.trained_parameters(chunks)]
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_object(own, dist.group.WORLD)) / "saved"
        dora_fx.save_checkpoint(chunks, folder)
        pipeline_gpt.set_adapter_values(chunks, sizes, " others")
        dora_fx.load_checkpoint(chunks, folder)
        dist.barrier()
    pairs = zip(pipeline_gpt.trained_parameters(chunks), before, strict=True)
    return max(relative_error(parameter, value) for (_, parameter, _), value in pairs)


FAULTS: list[tuple[Callable[[], None], Layout, Callable[[Layout], float]]] = [
    (nothing, ETP, worst_of_a_step),
    (nothing, APART, worst_of_training),
    (nothing, EP, worst_of_initial_factors),
    (nothing, Layout(2, tp=2, ep=2), worst_of_a_checkpoint),
    (dense_group_in_state_dicts, Layout(2, tp=2, ep=2), worst_of_a_checkpoint),
    (allreduce_of_weights, APART, worst_of_training),
    (local_numbers, EP, worst_of_initial_factors),
    (reduced_rows, ETP, worst_of_a_step),
    (copied_tokens, ETP, worst_of_a_step),
    (whole_magnitude_gradient, ETP, worst_of_a_step),
    (norm_of_the_shard, ETP, worst_of_a_step),
    *([(no_mark, Layout(2, tp=2, ep=2), worst_of_training)] if IS_OLD else []),
]


def try_fault(layout: Layout, plant: Callable[[], None], measure: Callable[[Layout], float]) -> float:
    plant()
    if plant is nothing:
        return measure(layout)
    try:
        return measure(layout)
    except (AssertionError, ValueError, dora_fx.CheckpointError):
        # The library's own checks notice some, and so does the comparison of ranks that hold the same.
        return float("inf")


def identify(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("fault", "layout", "measure"), FAULTS, ids=identify)
def test_a_planted_fault_is_noticed(fault: Any, layout: Layout, measure: Any) -> None:
    worst = run_layout(try_fault, layout, fault, measure)
    # Megatron takes norms of gradients in float32.
    assert worst < 1e-6 if fault is nothing else worst > 1e-4, worst


class Collectives(TorchDispatchMode):
    """The collectives that run in the block, as pairs of name and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__:
            tensors = torch.utils._pytree.tree_leaves(args)
            sizes = [each.numel() for each in tensors if isinstance(each, torch.Tensor)]
            self.found.append((function.__name__.partition(".")[0], max(sizes, default=0)))
        return function(*args, **(kwargs or {}))


def count(layout: Layout) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What a step of the base sends, and one of the adapted model after its first."""
    model, found = MoE(moe_config(layout, moe_shared_expert_intermediate_size=None)), []
    model.requires_grad_(False)
    for is_adapted in (False, True):
        if is_adapted:
            adapted(model)
            model(own_tokens(batch(0), layout))
        x = own_tokens(batch(0), layout).requires_grad_()
        with Collectives() as collectives:
            model(x).sum().backward()
        found.append(collectives.found)
    return found[0], found[1]


@pytest.mark.parametrize("layout", [EP, ETP], ids=str)
def test_collectives_of_experts(layout: Layout) -> None:
    """EP adds none; over the expert-tensor group gradients of the factors and magnitudes go, and no activation."""
    base, with_adapters = run_layout(count, layout)
    for each in base:
        with_adapters.remove(each)
    if layout is EP:
        assert not with_adapters
    else:
        assert with_adapters
        assert max(size for _, size in with_adapters) <= max(2 * FFN, HIDDEN) * 4 * len(TRAINED)
