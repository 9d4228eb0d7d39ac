"""Experts at every topology compute the function of one rank, and so do their gradients; compared with the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx.experts_compilation import compile_experts, moe_layers
from dora_fx.megatron import walk
from tests.closeness import assert_close, rounding
from tests.distributed import pipeline_gpt
from tests.distributed.launch import run_layout, visit_worlds
from tests.distributed.moe_layers import (
    COMPILED,
    EXPERTS,
    MODES,
    ROUNDINGS,
    ExpertLayout,
    MoE,
    Results,
    adapted,
    batch,
    bound_of_step,
    moe_config,
    named_sites,
    oracle_step,
    own_tokens,
    set_adapter_values,
    step,
    tensors_of_sites,
)
from tests.distributed.moe_training import STEPS, Mode, Training, oracle_training

slow = pytest.mark.slow
LAYOUTS = [
    ExpertLayout(),
    ExpertLayout(2, ep=2),
    ExpertLayout(2, tp=2, etp=2),
    ExpertLayout(2, tp=2, ep=2),
    ExpertLayout(2, tp=2),
    ExpertLayout(4, tp=2, ep=2, etp=2),
    ExpertLayout(2, etp=2),
    ExpertLayout(2, ep=2, dispatcher="alltoall"),
    ExpertLayout(2, tp=2, ep=2, dispatcher="alltoall"),
]


def cases(fast: ExpertLayout) -> list[Any]:
    """All layouts, of which a plain run takes one."""
    return [layout if layout == fast else pytest.param(layout, marks=slow) for layout in LAYOUTS]


def run(layout: ExpertLayout) -> dict[str, Any]:
    """On every rank: what attaching makes, and two batches of each mode; the second leaves experts without tokens."""
    model = MoE(moe_config(layout))
    x = own_tokens(batch(0), layout)
    base = model(x)
    adapted(model, set_values=False)
    found: dict[str, Any] = {"sites": described(model), "initial": tensors_of_sites(model)}
    assert torch.equal(model(x), base)
    set_adapter_values(model)
    expected = model(x)
    with dora_fx.merged(model):
        assert_close(model(x), expected, rounding(torch.float64, ROUNDINGS))
    assert torch.equal(model(x), expected)
    found["steps"] = {mode: run_mode(layout, *mode) for mode in MODES}
    return found


def run_mode(layout: ExpertLayout, compiler: str, dtype: torch.dtype, spec: str = "local") -> list[Results]:
    torch._dynamo.reset()
    model = adapted(MoE(moe_config(layout, dtype), spec))
    if compiler == "compiled":
        compile_experts(moe_layers(model.modules()), COMPILED)
    return [step(model, layout, number, dtype) for number in range(2)]


def described(model: MoE) -> dict[str, tuple[str, str, bool, int | None]]:
    """Name -> path, layout, `allreduce` and the expert's number of each adapted layer, of all ranks."""
    paths = {named.module: named.whole_path for named in walk(model)}
    own = {}
    for name, site in named_sites(model).items():
        adapter = site.adapter
        marks = {getattr(parameter, "allreduce", True) for parameter in adapter.parameters()}
        first = None if adapter.experts is None else adapter.experts.first
        own[name] = (paths[site], adapter.layout_name, marks.pop(), first)
        assert not marks
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: site for of_rank in everyone for name, site in of_rank.items()}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_layout(run, ExpertLayout())


@pytest.mark.parametrize("layout", cases(ExpertLayout(2, tp=2, etp=2)), ids=str)
def test_every_topology_computes_the_function_of_one_rank(layout: ExpertLayout, one_rank: dict[str, Any]) -> None:
    found = run_layout(run, layout) if layout.world_size > 1 else one_rank
    expected = [oracle_step(number) for number in range(2)]
    for (_, dtype), steps in found["steps"].items():
        for number, result in enumerate(steps):
            assert_close(result, expected[number], bound_of_step(dtype))
    # A row layer's norms are sums over the ranks.
    assert_close(found["initial"], one_rank["initial"], rounding(torch.float64, ROUNDINGS))
    factors = [name for name in one_rank["initial"] if not name.endswith("magnitude")]
    assert all(torch.equal(found["initial"][name], one_rank["initial"][name]) for name in factors)
    is_sharded = layout.ep > 1 or layout.etp > 1
    for name, (path, row, allreduce, first) in found["sites"].items():
        parts = name.split()
        is_row = name.endswith("fc2")
        if parts[0] == "shared":
            assert path == f"mlp.shared_experts.{parts[1]}" and allreduce and first is None
            assert row == ("row" if is_row else "column") + "_sequence_parallel" * (layout.tp > 1)
        else:
            assert path == f"mlp.experts.local_experts.{parts[1]}.{parts[2]}" and first == int(parts[1])
            assert allreduce == (layout.ep == 1 and layout.etp == layout.tp)
            assert row.startswith("row" if is_row else "column") and row.endswith("_expert") == is_sharded
    assert len(found["sites"]) == 2 * EXPERTS + 2


def problems_of_one_rank(layout: ExpertLayout) -> list[str]:
    """Messages of rank 0 where experts of rank 1 alone are not finite: when they are adapted, and when merged."""
    found = []
    model = MoE(moe_config(layout))
    weight = model.mlp.experts.local_experts[0].linear_fc1.weight.data
    kept = weight[0, 0].clone()
    if dist.get_rank() == 1:
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError) as error:
        adapted(model)
    found.append(str(error.value))
    weight[0, 0] = kept
    adapted(model)
    sites = named_sites(model)
    if dist.get_rank() == 1:
        next(iter(sites.values())).adapter.linear_out.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError) as error:
        dora_fx.merge(model)
    found.append(str(error.value))
    assert named_sites(model).keys() == sites.keys()
    return found


def test_what_is_wrong_on_one_rank_is_an_error_on_all() -> None:
    attached, merged = run_layout(problems_of_one_rank, ExpertLayout(2, ep=2))
    assert "local_experts.2.linear_fc1: the base weight has NaN or inf in 1 of" in attached
    assert "local_experts.2.linear_fc1" in merged and "NaN" in merged


TRAINING = [
    Mode(),
    Mode(complete_gradients="every_backward", late=True),
    Mode(overlap=True, late=True),
    Mode(torch.float32, distributed=True),
    Mode(torch.float32),
    Mode(torch.bfloat16),
    Mode(torch.bfloat16, distributed=True, overlap=True),
]


def train(layout: ExpertLayout) -> dict[Mode, Results]:
    return {mode: Training(layout, mode).results() for mode in TRAINING}


@pytest.mark.parametrize("layout", cases(ExpertLayout(2, tp=2, ep=2)), ids=str)
def test_training_is_that_of_one_rank(layout: ExpertLayout) -> None:
    """Under Megatron's data parallelism, three steps of two micro-batches, with clipped gradients and Adam."""
    for mode, found in run_layout(train, layout).items():
        # Megatron takes the norm in float32 at most.
        coarse = torch.float32 if mode.dtype == torch.float64 else mode.dtype
        assert_trained(found, mode, rounding(coarse, ROUNDINGS))


def assert_trained(found: Results, mode: Mode, bound_of_norms: float, num_shared: int = 1) -> None:
    """Compare all that `Training` found with the oracle."""
    expected = oracle_training(mode.clip, num_shared)
    if mode.distributed:
        # No rank has whole gradients.
        expected = {name: value for name, value in expected.items() if not name.startswith("d ")}
    norms = [name for name in expected if name.startswith("norm")]
    wanted = {name: expected.pop(name) for name in norms}
    assert_close({name: found.pop(name) for name in norms}, wanted, bound_of_norms)
    assert_close(found, expected, rounding(mode.dtype, ROUNDINGS * STEPS))


def train_in_pipelines(layout: pipeline_gpt.Layout, folder: Path) -> None:
    training = pipeline_gpt.Training(layout, pipeline_gpt.Kind(experts=True, sequence_parallel=True))
    losses = torch.tensor([training.train(number) for number in range(3)], dtype=torch.float64)
    if dist.get_rank() == 0:
        torch.save(losses, folder / f"{layout}.pt")


@pytest.mark.slow
def test_losses_in_pipelines(tmp_path: Path) -> None:
    """Through Megatron's schedule, in micro-batches, with attention and shared experts adapted too."""
    layouts = [
        pipeline_gpt.Layout(),
        pipeline_gpt.Layout(pp=2, dp=2, ep=2),
        pipeline_gpt.Layout(tp=2, pp=2, etp=1),
        pipeline_gpt.Layout(tp=2, pp=2, ep=2, etp=1),
        pipeline_gpt.Layout(pp=2, dp=2, vpp=2, ep=2),
    ]
    visit_worlds([(train_in_pipelines, layout) for layout in layouts], tmp_path)
    expected, *others = (torch.load(tmp_path / f"{layout}.pt") for layout in layouts)
    assert expected[0] > expected[-1]
    for found in others:
        assert_close(found, expected, rounding(torch.float32, 3 * pipeline_gpt.ROUNDINGS_OF_A_STEP))
