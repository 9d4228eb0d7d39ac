"""What is written into an adapter that a 16-bit optimizer of Megatron's trains stays, or is an error that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

import dora_fx
from dora_fx.megatron.optimizer_copies import MainCopy, _equal, _equal_by_norms, differing, main_copies
from dora_fx.modules.written_parameters import OverwrittenParametersError
from tests.distributed.bridge import adapter_shards, saving_on_cpu
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, Training, trained_parameters, unwrapped

KINDS = [Kind(optimizer="bf16"), Kind(optimizer="distributed")]
LORA_B = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"


def training(layout: Layout, kind: Kind, salt: str = "") -> Training:
    """One that has stepped, and whose next steps change nothing by themselves."""
    made = Training(layout, kind, salt)
    made.step(0)
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0
    return made


def values_of(made: Training) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter, _ in trained_parameters(made.chunks)}


def assert_kept(made: Training, expected: dict[str, torch.Tensor]) -> None:
    for when in ("after the write", "after a step"):
        for name, value in values_of(made).items():
            assert torch.equal(value, expected[name]), f"{name} {when}"
        made.step(1)
        assert not any(differing(main_copies(single)) for single in made.optimizer.chained_optimizers)


def through_checkpoint(source: Training, target: Training, folder: Path) -> None:
    dora_fx.save_checkpoint(source.chunks, folder / "checkpoint")
    dora_fx.load_checkpoint(target.chunks, folder / "checkpoint")


def through_peft(source: Training, target: Training, folder: Path) -> None:
    dora_fx.export_hf(source.chunks, folder / "peft")
    dora_fx.import_hf(target.chunks, folder / "peft")


def through_bridge(source: Training, target: Training, folder: Path) -> None:
    (folder / "bridge").mkdir()
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(unwrapped(source.chunks[0])), str(folder / "bridge"))
    dora_fx.load_bridge_checkpoint(target.chunks, folder / "bridge", tensor_parallel_size=1)


def through_state_dict(source: Training, target: Training, _: Path) -> None:
    target.chunks[0].load_state_dict(source.chunks[0].state_dict())


LOADERS = [through_checkpoint, through_peft, through_bridge, through_state_dict]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_was_loaded_stays(kind: Kind, tmp_path: Path, world: None) -> None:
    source = training(Layout(), kind, " of another run")
    expected = values_of(source)
    for load in LOADERS:
        target = training(Layout(), kind)
        load(source, target, tmp_path)
        assert_kept(target, expected)
    dora_fx.unmerge(dora_fx.merge(source.chunks, keep_adapter=True))
    assert_kept(source, expected)


def by_copy(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1)


def by_data(parameter: torch.nn.Parameter) -> None:
    parameter.data[0] += 1


def by_new_memory(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.clone()


def refused(made: Training, write: Callable[[Any], None], name: str, message: str) -> None:
    parameter = unwrapped(made.chunks[0]).get_parameter(name)
    write(parameter)
    written = values_of(made)
    with pytest.raises(OverwrittenParametersError, match=re.escape(name) + message):
        made.step(1)
    assert all(torch.equal(value, written[name]) for name, value in values_of(made).items())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_write_that_the_step_would_undo_is_refused(kind: Kind, world: None) -> None:
    made = training(Layout(), kind)
    for write in (by_copy, by_data):
        refused(made, write, LORA_B, ": found other values than the optimizer's float32 copy has")
        written = values_of(made)
        made.optimizer.reload_model_params()
        assert_kept(made, written)
    # Magnitudes are float32, and have no copies.
    by_data(unwrapped(made.chunks[0]).get_parameter(LORA_B.replace("linear_out.weight", "weight_magnitude")))
    assert_kept(made, values_of(made))


def test_a_parameter_that_left_the_buffer_is_refused(world: None) -> None:
    for name in (LORA_B, LORA_B.replace("linear_out.weight", "weight_magnitude")):
        made = training(Layout(), Kind(optimizer="distributed"))
        refused(made, by_new_memory, name, ": found it outside the buffer")


def test_digits_that_a_parameter_has_not_are_kept(tmp_path: Path, world: None) -> None:
    made = training(Layout(), KINDS[0])
    dora_fx.save_checkpoint(made.chunks, tmp_path / "checkpoint")
    [single] = made.optimizer.chained_optimizers
    before = [copy.main.clone() for copy in main_copies(single)]
    assert any(not torch.equal(main, main.bfloat16().float()) for main in before)
    dora_fx.load_checkpoint(made.chunks, tmp_path / "checkpoint")
    assert all(torch.equal(copy.main, main) for copy, main in zip(main_copies(single), before, strict=True))


def test_devices_compare_as_a_cpu_does() -> None:
    values = torch.tensor([1.0, -0.0, 6e-8, 65504.0])
    for dtype in (torch.bfloat16, torch.float16):
        mine = [values.to(dtype) for _ in range(6)]
        others = [tensor.clone() for tensor in mine]
        for index, tensor in enumerate(others[1:5]):
            # One in the last place, or the least number above zero.
            tensor.view(torch.int16)[index] += 1
        others[5][1] = 0.0
        assert _equal(mine, others) == _equal_by_norms(mine, others) == [True, False, False, False, False, True]
        unknown = [torch.full_like(tensor, math.nan) for tensor in mine]
        assert not any(_equal_by_norms(unknown, unknown))
        copies = [MainCopy(torch.nn.Parameter(tensor), tensor.float(), slice(None)) for tensor in unknown]
        assert differing(copies) == []


def load_and_step(layout: Layout, folder: Path) -> None:
    for kind in KINDS:
        source, target = training(layout, kind, " of another run"), training(layout, kind)
        expected = values_of(source)
        dora_fx.save_checkpoint(source.chunks, folder / f"{kind} {layout}")
        dora_fx.load_checkpoint(target.chunks, folder / f"{kind} {layout}")
        assert_kept(target, expected)
        # Every rank has a part of some parameter.
        for _, parameter, _ in trained_parameters(target.chunks):
            by_copy(parameter)
        with pytest.raises(OverwrittenParametersError, match="float32 copy has"):
            target.step(1)


def test_each_rank_keeps_its_part(tmp_path: Path) -> None:
    visit_worlds([(load_and_step, Layout(dp=2))], tmp_path)


@pytest.mark.slow
def test_each_rank_keeps_its_part_at_other_layouts(tmp_path: Path) -> None:
    visit_worlds(
        [(load_and_step, layout) for layout in (Layout(tp=2), Layout(pp=2, vpp=2), Layout(tp=2, dp=2))], tmp_path
    )
