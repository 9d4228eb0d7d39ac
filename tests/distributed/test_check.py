"""`dora_fx.check` says nothing of set-ups that train, at any layout, and finds every one of a list of faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout
from tests.distributed.preflight_faults import (
    FAULTS,
    FAULTS_OF_RANKS,
    SetUp,
    matches,
    seen_as,
)


def state_of(setup: SetUp) -> dict[str, Any]:
    """Everything that a check could leave a trace in."""
    inner = [single.optimizer for single in getattr(setup.optimizer, "chained_optimizers", [setup.optimizer])]
    return {
        "parameters": [p.detach().clone() for chunk in setup.chunks for p in chunk.parameters()],
        "buffers": [b.clone() for chunk in setup.chunks for n, b in chunk.named_buffers() if not _is_computed(n)],
        "gradients": [None if p.grad is None else p.grad.clone() for chunk in setup.chunks for p in chunk.parameters()],
        "main copies": [p.detach().clone() for each in inner for group in each.param_groups for p in group["params"]],
        "settings": [{k: v for k, v in g.items() if k != "params"} for each in inner for g in each.param_groups],
        "states": [dict(state) for each in inner for state in each.state.values()],
        "modes": [module.training for chunk in setup.chunks for module in chunk.modules()],
        "generator": torch.get_rng_state(),
    }


def _is_computed(name: str) -> bool:
    """Return whether a buffer follows from the parameters, and is filled when it is needed."""
    return ".cached_" in name or name.endswith("base_norm_sq")


# Compiled and not, with float32 copies of the parameters and parts of them.
KINDS = [Kind(), Kind(sequence_parallel=True, optimizer="distributed"), Kind(optimizer="bf16")]


def check_sound_set_ups(layout: Layout, folder: Path) -> None:
    """Nothing is wrong and nothing is changed; the loss is that of one rank."""
    for kind in KINDS:
        assert_sound(layout, kind, _loss_on_one_rank(layout, kind, folder))


def check_experts(layout: Layout, folder: Path) -> None:
    """Tokens go to other experts as adapters move, and each expert is on other ranks than a dense layer."""
    for optimizer in ("fp32", "distributed"):
        assert_sound(layout, Kind(experts=True, sequence_parallel=layout.tp > 1, optimizer=optimizer), None)


def assert_sound(layout: Layout, kind: Kind, loss: float | None) -> None:
    setup = SetUp(layout, kind, compiles=kind.optimizer == "fp32")
    before = state_of(setup)
    report = setup.check(loss)
    assert not report.failed, f"{layout} {kind}\n{report}"
    assert {finding.verdict for finding in report.findings if finding.name == "slope"} == {"ok"}, report
    torch.testing.assert_close(state_of(setup), before, rtol=0, atol=0, equal_nan=True)


def check_a_bare_stage(layout: Layout, folder: Path) -> None:
    """A stage without adapters is a part of a sound set-up."""
    for bare, kind in enumerate(KINDS[:2]):
        report = SetUp(layout, kind, targets=[f"*.layers.{1 - bare}.*"]).check()
        assert not report.failed, f"{layout} {kind}\n{report}"
        assert {finding.name for finding in report.findings if finding.verdict == "ok"} >= {"merged", "slope", "steps"}


def check_faults(layout: Layout, folder: Path) -> None:
    loss = _loss_on_one_rank(layout, Kind(), folder)
    # Dropout makes other losses of the same adapters.
    reference = loss if layout.world_size > 1 else None
    of_ranks = [fault for fault in FAULTS_OF_RANKS if fault.dp == layout.dp]
    for fault in FAULTS if layout == Layout() else of_ranks:
        seen = seen_as(fault, layout, reference)
        assert matches(fault, seen), f"{fault.name}: {seen}"


def _loss_on_one_rank(layout: Layout, kind: Kind, folder: Path) -> float | None:
    """What the report of one rank says of the same model, which pipelines of several stages here have not."""
    if layout.pp > 1:
        return None
    file = folder / f"loss in {kind.dtype}"
    if layout == Layout() and not file.exists():
        torch.save(SetUp(layout, kind).check().loss, file)
    loss: float = torch.load(file)
    return loss


def test_sound_set_ups_pass_and_are_left_as_they_were(tmp_path):
    layouts = [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(pp=2, vpp=2)]
    visits = [(check_sound_set_ups, layout) for layout in layouts]
    visit_worlds([*visits, (check_a_bare_stage, Layout(pp=2))], tmp_path)


EXPERT_LAYOUTS = [Layout(dp=2, ep=2, etp=1), Layout(tp=2, etp=2)]
MORE_EXPERT_LAYOUTS = [Layout(), Layout(tp=2, ep=2, etp=1), Layout(tp=2, etp=1)]


@pytest.mark.parametrize(
    "layouts", [EXPERT_LAYOUTS, pytest.param(MORE_EXPERT_LAYOUTS, marks=pytest.mark.slow)], ids=["two", "more"]
)
def test_sound_experts_pass(layouts, tmp_path):
    visit_worlds([(check_experts, layout) for layout in layouts], tmp_path)


@pytest.mark.default
def test_every_fault_is_found_for_what_it_is(tmp_path):
    visit_worlds([(check_faults, layout) for layout in (Layout(), Layout(tp=2), Layout(dp=2))], tmp_path)
