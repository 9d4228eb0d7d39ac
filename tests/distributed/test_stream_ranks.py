"""Streams from tensor-parallel ranks and pipeline stages: whole tensors, in one order, on rank 0 or on every rank."""

from __future__ import annotations

import datetime
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file

import dora_fx
from dora_fx.hf.counterpart import gpt_counterpart
from dora_fx.hf.model_record import model_record
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from dora_fx.models import build_gpt_model, causal_mask
from dora_fx.models.hf_architectures import HF_ARCHITECTURES
from dora_fx.models.hf_parts import HFParts
from dora_fx.modules.whole_tensors import gather_whole
from tests.distributed.launch import run_ranks, visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, attach, build_base, set_adapter_values
from tests.hf_models import tiny_hf_model
from tests.peft_models import adapted_megatron
from tests.processes import start_process

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
    dora_fx.export_hf(chunks, folder / f"exported {layout}", model_type="llama")
    adapters = dict(dora_fx.iter_adapter(chunks, model_type="llama", every_rank=True))
    exported = load_file(folder / f"exported {layout}" / "adapter_model.safetensors")
    torch.testing.assert_close(adapters, exported, rtol=0, atol=0)
    merged = dict(dora_fx.iter_merged(chunks, model_type="llama", every_rank=True))
    dora_fx.merge(chunks)
    found = {name: tensor for chunk in chunks for name, tensor in hf_weights(chunk).items()}
    assert len(found) == 7 * 4 // layout.pp
    torch.testing.assert_close(found, {name: merged[name] for name in found}, rtol=0, atol=0)


def hf_weights(chunk: Any) -> dict[str, torch.Tensor]:
    """The weights of a chunk's layers, put together from the ranks' shards, by their names in Hugging Face models."""
    parts = HFParts.of(HF_ARCHITECTURES["llama"], chunk.config)
    found = {}
    for linear in gpt_counterpart(model_record([chunk])).linears:
        spec = linear.describe()
        if linear.whole_path.startswith("decoder."):
            whole = gather_whole(spec.weight, spec.weight_placement, spec.tp_group_name)
            rows = parts.rows(linear.whole_path, len(whole))
            found |= {f"{name}.weight": whole[index] for name, index in rows.items()}
    return found


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


# A rank that is gone

TIMEOUT = datetime.timedelta(seconds=5)


def break_off(rank: int, folder: Path, iterate: Callable[..., Any], leave: Callable[[], object]) -> None:
    """Leave rank 1 in the middle of a stream, and write down what rank 0 hears of it."""
    layout = Layout(pp=2)
    with layout.world(rank, folder / "store"):
        chunks = attach(build_base(layout, Kind()))
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.group.WORLD)
        names = []
        try:
            for name, _ in iterate(chunks, model_type="llama", every_rank=True):
                names.append(name)
                if rank == 1 and len(names) == 3:
                    leave()
        except RuntimeError as error:
            (folder / "error").write_text(f"{names[-1]}\n{error}")
        # What is left of the world has nobody to be taken down with.
        os._exit(0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stay_away() -> None:
    time.sleep(600)


@pytest.mark.parametrize("iterate", [dora_fx.iter_adapter, dora_fx.iter_merged])
@pytest.mark.parametrize("leave", [die, stay_away])
def test_a_rank_that_leaves_is_an_error_within_the_timeout(
    leave: Callable[[], object], iterate: Callable[..., Any], tmp_path: Path
) -> None:
    ranks = [start_process(break_off, rank, tmp_path, iterate, leave) for rank in range(2)]
    try:
        # Not a bound for the machine to keep, but far below the half hour that a group waits by default.
        ranks[0].join(240)
        assert ranks[0].exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    last, message = (tmp_path / "error").read_text().split("\n", 1)
    assert message.startswith(f"the stream of weights broke off after {last}: another rank is gone, or did not take")


# What merging changes


def compare(layout: Layout, folder: Path) -> None:
    chunks = attach(build_base(layout, Kind()))
    set_adapter_values(chunks, layout)
    before = [{name: value.clone() for name, value in chunk.named_parameters()} for chunk in chunks]
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    if layout.pp == 1:
        positions = torch.arange(16).expand(2, -1)
        batch = (tokens[:, :-1], positions, causal_mask(16, "cpu"))
        found = dora_fx.compare_merged(chunks, *batch, labels=tokens[:, 1:], dtype=torch.bfloat16)
    else:
        with pytest.raises(ValueError, match="log_probs: found None for a pipeline, expected a function that runs its"):
            dora_fx.compare_merged(chunks, tokens, dtype=torch.bfloat16)
        log_probs = functools.partial(scheduled_log_probs, chunks, tokens)
        found = dora_fx.compare_merged(chunks, dtype=torch.bfloat16, log_probs=log_probs)
    for chunk, parameters in zip(chunks, before, strict=True):
        torch.testing.assert_close(dict(chunk.named_parameters()), parameters, rtol=0, atol=0)
    torch.save(found, folder / f"compared {layout} {dist.get_rank()}")


def scheduled_log_probs(chunks: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    losses: list[torch.Tensor] = []

    def forward_step(batches: Any, chunk: Any) -> Any:
        batch = next(batches)
        positions = torch.arange(16).expand(len(batch), -1)
        output = chunk(batch[:, :-1], positions, causal_mask(16, "cpu"), labels=batch[:, 1:])
        return output, lambda found: (losses.append(found), (found.mean(), found.mean()))[1]

    with cuda_means_cpu():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([tokens]) for _ in chunks] if len(chunks) > 1 else iter([tokens]),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=16,
            micro_batch_size=len(tokens),
            forward_only=True,
        )
    return -losses[0] if losses else None


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), pytest.param(Layout(dp=2), marks=pytest.mark.slow)])
def test_comparisons_are_the_same_at_every_layout(layout: Layout, tmp_path: Path) -> None:
    visit_worlds([(compare, Layout()), (compare, layout)], tmp_path)
    expected, first, second = (
        torch.load(tmp_path / f"compared {name}", weights_only=False)
        for name in (f"{Layout()} 0", f"{layout} 0", f"{layout} 1")
    )
    assert first == second
    assert [gap.path for gap in first.layers] == [gap.path for gap in expected.layers]
    # Both gaps are those of bfloat16's rounding, a ten-thousandth of which float32's sums are off by.
    for gap, other in zip(first.layers, expected.layers, strict=True):
        for name in ("change", "lost", "unmoved", "output_gap"):
            assert getattr(gap, name) == pytest.approx(getattr(other, name), rel=0.05), (gap.path, name)
    assert first.num_tokens == expected.num_tokens * layout.dp
    assert first.mean_gap == pytest.approx(expected.mean_gap, rel=0.05) and first.mean_gap > 0
