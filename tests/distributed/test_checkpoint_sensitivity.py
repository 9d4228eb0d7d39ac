"""The tests of checkpoints notice what is known to go wrong with adapters, planted in the library's own code."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx import CheckpointError
from dora_fx.function import site_parameters
from dora_fx.modules import sharded_state_dict
from tests.closeness import relative_error, rounding
from tests.distributed.launch import visit_worlds
from tests.distributed.mutations import Mutation, planted
from tests.distributed.pipeline_gpt import (
    FFN,
    Kind,
    Layout,
    attach,
    build_base,
    expected_adapters,
    expected_norms,
    set_adapter_values,
)
from tests.distributed.test_checkpoint_reshaping import whole_tensors

describe = sharded_state_dict.adapter_sharded_state_dict
MUTATIONS = [
    Mutation(
        "row magnitude of each rank's own columns",
        site_parameters._row_norms,
        "site.layout.shards_input_features",
        "False",
    ),
    Mutation("gated magnitude in one block", describe, "blocks == 2]", 'blocks == 2 and "out" in name]'),
    Mutation("gated B in one block", describe, "blocks == 2]", 'blocks == 2 and "out" not in name]'),
    Mutation(
        "shards of other ranks dropped", describe, "placement.shard_dim is not None}", "placement.shard_dim is name}"
    ),
    Mutation(
        "replicas saved twice",
        describe,
        "    in_blocks =",
        "    for shard in sharded.values():\n        shard.replica_id = 0\n    in_blocks =",
    ),
    Mutation(
        "local layer numbers",
        describe,
        "        sharded_offsets,\n        tp_group=tp_group",
        "        tuple((axis, layer % 2, total) for axis, layer, total in sharded_offsets),\n        tp_group=tp_group",
    ),
    Mutation(
        "A sharded along the other dimension", describe, "name: placement.shard_dim", "name: len(placement.shape) - 1"
    ),
]
KIND, LAYOUTS = Kind(), [Layout(tp=2), Layout(pp=2)]


def first_wrong(layout: Layout, folder: Path) -> str:
    """What betrays a fault: the error, or the first tensor of a checkpoint that differs; "" if nothing does."""
    try:
        chunks = attach(build_base(layout, KIND))
        dora_fx.save_checkpoint(chunks, folder / "untrained")
        set_adapter_values(chunks, layout)
        dora_fx.save_checkpoint(chunks, folder / "set")
    except (CheckpointError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    untrained, found = whole_tensors(folder / "untrained"), whole_tensors(folder / "set")
    for key, norms in expected_norms(KIND).items():
        value = untrained[key].double()
        if value.shape != norms.shape or relative_error(value, norms) > rounding(torch.float32, FFN):
            return f"untrained {key}"
    for key, whole in expected_adapters(KIND).items():
        if not torch.equal(found[key], whole):
            return key
    return ""


def catch(layout: Layout, folder: Path) -> None:
    caught = {}
    for mutation in [None, *MUTATIONS]:
        name = "none planted" if mutation is None else mutation.name
        with planted(mutation) if mutation is not None else contextlib.nullcontext():
            caught[name] = first_wrong(layout, folder / f"{layout} {name}")
    if dist.get_rank() == 0:
        torch.save(caught, folder / f"{layout}.pt")


@pytest.mark.default
def test_every_planted_fault_is_caught(tmp_path: Path) -> None:
    visit_worlds([(catch, layout) for layout in LAYOUTS], tmp_path)
    results = [torch.load(tmp_path / f"{layout}.pt") for layout in LAYOUTS]
    for name in results[0]:
        print(f"{name:45} {' | '.join(result[name][:120] or '-' for result in results)}")
    assert [result.pop("none planted") for result in results] == ["", ""]
    survived = [mutation.name for mutation in MUTATIONS if not any(result[mutation.name] for result in results)]
    assert not survived
