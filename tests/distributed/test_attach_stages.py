"""`DoRA` adapts the same layers with the same initial factors at every pipeline size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from tests.distributed.launch import visit_worlds
from tests.distributed.pipeline_gpt import Kind, Layout, build_base, name_of, unwrapped
from tests.distributed.zoo import gather, shardings, sites_of, tensors_of

# The layers of the first and of the last stage, by their numbers and by their names.
TARGETS = ["*.layers.0.*.linear_fc1", "decoder.layers.3.mlp.linear_fc2", "*.layers.2.*.linear_proj"]
NAMES = [
    "decoder.layers.0.mlp.linear_fc1",
    "decoder.layers.2.self_attention.linear_proj",
    "decoder.layers.3.mlp.linear_fc2",
]


def adapt(layout: Layout, folder: Path) -> None:
    """Leave every rank's initial factors, whole, by the layers' names in the whole model."""
    torch.manual_seed(100 + dist.get_rank())
    chunks = build_base(layout, Kind())
    dora = dora_fx.DoRA(TARGETS, dim=4, lora_B_init_method="normal")
    dora(chunks)
    found: dict[str, Any] = {}
    for chunk in map(unwrapped, chunks):
        for path, site in sites_of(chunk).items():
            rules, group = shardings(path, site.to_wrap), site.to_wrap.tp_group
            wholes = {name: gather(tensors_of(site)[name], rules[name], group) for name in ("lora_a", "lora_b")}
            found[name_of(chunk, path)] = wholes
            assert site.path == name_of(chunk, path)
    assert [site.path for site in dora.report.sites] == list(found)
    torch.save(found, folder / f"{layout} {dist.get_rank()}")


def factors(layout: Layout, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of all ranks; replicas of a layer are bitwise the same."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for rank in range(layout.world_size):
        for name, wholes in torch.load(folder / f"{layout} {rank}").items():
            for part, whole in wholes.items():
                assert torch.equal(found.setdefault(name, wholes)[part], whole), (rank, name, part)
    return dict(sorted(found.items()))


@pytest.mark.parametrize(
    "layouts",
    [
        [Layout(pp=2), Layout(pp=2, vpp=2), Layout(dp=2)],
        pytest.param([Layout(pp=4), Layout(tp=2, pp=2), Layout(pp=2, dp=2)], marks=pytest.mark.slow),
    ],
    ids=["two_ranks", "four_ranks"],
)
def test_layers_and_initial_factors_are_those_of_one_stage(layouts: list[Layout], tmp_path: Path) -> None:
    visit_worlds([(adapt, layout) for layout in (Layout(), *layouts)], tmp_path)
    expected = factors(Layout(), tmp_path)
    assert list(expected) == NAMES
    assert not torch.equal(*(expected[name]["lora_a"][:, :32] for name in (NAMES[0], NAMES[1])))
    for layout in layouts:
        found = factors(layout, tmp_path)
        assert found.keys() == expected.keys()
        for name, wholes in expected.items():
            for part, whole in wholes.items():
                assert torch.equal(found[name][part], whole), (str(layout), name, part)


def adapt_what_is_not_there(layout: Layout, folder: Path) -> None:
    chunks = build_base(layout, Kind())
    for targets, message in ((["linear_qvk"], "no module matched"), ([*TARGETS, "*.layers.4.*"], "matched nothing")):
        with pytest.raises(ValueError, match=message):
            dora_fx.DoRA(targets)(chunks)
    assert not any(sites_of(chunk) for chunk in chunks)
    (folder / str(dist.get_rank())).touch()


def test_a_target_that_no_stage_has_is_an_error_on_every_rank(tmp_path: Path) -> None:
    visit_worlds([(adapt_what_is_not_there, Layout(pp=2))], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
