"""Streams from tensor-parallel ranks and pipeline stages: whole tensors, in one order, on rank 0 or on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx.models import build_gpt_model
from tests.distributed.launch import run_ranks, visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base, set_adapter_values
from tests.hf_models import tiny_hf_model
from tests.peft_models import adapted_megatron

# Three query groups do not divide by two ranks, so a fourth is padding.
CASES: dict[str, dict[str, Any]] = {"qwen2": dict(num_key_value_heads=3), "phi3": {}}


def merge_and_rebuild() -> dict[str, list[str]]:
    """Names of the tensors of a merged model that a model built of its stream has otherwise, by case."""
    differing = {}
    for kind, overrides in CASES.items():
        hf = tiny_hf_model(kind, **overrides)
        model = adapted_megatron(hf)
        stream = dict(dora_fx.iter_merged(model, every_rank=True))
        assert stream.keys() == hf.state_dict().keys()
        rebuilt = build_gpt_model(hf.config, stream).state_dict()
        merged = dora_fx.merge(model).state_dict()
        differing[kind] = [
            name
            for name, value in merged.items()
            if isinstance(value, torch.Tensor) and not torch.equal(rebuilt[name], value)
        ]
    return differing


def test_the_stream_of_two_ranks_has_the_shards_of_merge() -> None:
    assert run_ranks(merge_and_rebuild, 2, 2) == {kind: [] for kind in CASES}


def stream(layout: Layout, folder: Path) -> None:
    chunks = attach(build_base(layout, Kind()))
    set_adapter_values(chunks, layout)
    for name, iterate in (("adapter", dora_fx.iter_adapter), ("merged", dora_fx.iter_merged)):
        here = list(iterate(chunks, model_type="llama"))
        everywhere = list(iterate(chunks, model_type="llama", every_rank=True))
        assert bool(here) == (dist.get_rank() == 0)
        if here:
            assert [key for key, _ in here] == [key for key, _ in everywhere]
            torch.testing.assert_close(dict(here), dict(everywhere), rtol=0, atol=0)
        torch.save(everywhere, folder / f"{name} {layout} {dist.get_rank()}")


def streams(name: str, layout: Layout, folder: Path) -> list[tuple[str, torch.Tensor]]:
    """Of rank 0; every rank has the same."""
    first, *others = (torch.load(folder / f"{name} {layout} {rank}") for rank in range(layout.world_size))
    for other in others:
        assert [key for key, _ in other] == [key for key, _ in first]
        torch.testing.assert_close(dict(other), dict(first), rtol=0, atol=0)
    return first


@pytest.mark.parametrize(
    ("layouts", "norms_by"),
    [
        ([Layout(), Layout(pp=2), Layout(pp=2, vpp=2), Layout(dp=2)], 1),
        pytest.param([Layout(tp=2), Layout(tp=2, pp=2), Layout(tp=2, dp=2)], 2, marks=pytest.mark.slow),
    ],
    ids=["one_tensor_rank", "two_tensor_ranks"],
)
def test_the_stream_is_the_same_from_every_layout(layouts: list[Layout], norms_by: int, tmp_path: Path) -> None:
    """Norms of row layers are sums over tensor-parallel ranks, in their order: bitwise the same for as many ranks."""
    assert {layout.tp for layout in layouts} == {norms_by}
    visit_worlds([(stream, layout) for layout in layouts], tmp_path)
    for name in ("adapter", "merged"):
        expected = streams(name, layouts[0], tmp_path)
        for layout in layouts[1:]:
            found = streams(name, layout, tmp_path)
            assert [key for key, _ in found] == [key for key, _ in expected]
            torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def refuse(layout: Layout, folder: Path) -> None:
    """A stage alone has what cannot be merged, and every rank says so."""
    chunks = attach(build_base(layout, Kind()))
    if dist.get_rank() == 1:
        site = next(module for module in chunks[0].modules() if isinstance(module, dora_fx.DoRALinear))
        site.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"the adapter is disabled.*found on rank 1"):
        dora_fx.iter_merged(chunks)


def test_what_one_stage_cannot_merge_is_refused_on_every_rank(tmp_path: Path) -> None:
    visit_worlds([(refuse, Layout(pp=2))], tmp_path)
