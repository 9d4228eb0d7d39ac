"""What goes into the key of torch's caches for the functions that a rewritten graph calls by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_fx.passes.cache_keys import (
    cacheable_functions,
    calls_only_known_functions,
    digest_of_sources,
    source_digest,
)
from tests.graph.capture import capture
from tests.graph.conftest import fake_world
from tests.graph.sites import IN, adapted, column, row

PACKAGE = Path(__file__).parents[2] / "dora_fx"
GATHERING = "dora_fx.function.collectives.gather_features"


def functions(tp_size: int, *, tp_rank: int = 0, recompute: bool = False) -> dict[str, str]:
    """Of a column layer that gathers its output, with dropout, as one rank compiles it."""
    torch._dynamo.reset()
    with fake_world(tp_size, tp_rank):
        layer = adapted(column(gather_output=True), dropout=0.1)
        [after] = capture(layer, IN, recompute=recompute).after
        assert calls_only_known_functions(after)
        return cacheable_functions(after)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_function_of_this_package_is_named(recompute: bool) -> None:
    assert sorted(functions(2, recompute=recompute)) == [
        "dora_fx.function.collectives.copy_to_group",
        GATHERING,
        "dora_fx.function.collectives.substitute_gathered_rows",
        "dora_fx.function.dropout.draw_dropout_key",
        "dora_fx.function.dropout.dropout",
        "dora_fx.function.row_scale.trained_delta",
    ]


def test_the_rank_matters_where_its_graph_is_another_one() -> None:
    first, second = functions(2), functions(2, tp_rank=1)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == [GATHERING]


def test_the_size_of_the_group_matters() -> None:
    two, four = functions(2), functions(4)
    assert two.keys() == four.keys()
    assert [name for name in two if two[name] == four[name]] == [
        "dora_fx.function.dropout.dropout",
        "dora_fx.function.row_scale.trained_delta",
    ]


def test_one_rank_without_dropout_has_the_scale_alone(tensor_parallel) -> None:
    tensor_parallel(1)
    [after] = capture(adapted(row()), IN).after
    assert list(cacheable_functions(after)) == ["dora_fx.function.row_scale.scale_rows"]
    assert calls_only_known_functions(after)


@torch.compiler.allow_in_graph
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Doubled(nn.Module):
    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.layer, self.recompute = adapted(row()), recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(double, x, use_reentrant=False) if self.recompute else double(x)
        return self.layer(x)[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_function_of_others_is_not_vouched_for(recompute: bool, tensor_parallel) -> None:
    tensor_parallel(1)
    [after] = capture(Doubled(recompute=recompute), IN).after
    assert not calls_only_known_functions(after)
    assert not [name for name in cacheable_functions(after) if "double" in name]


SHAPES_GRAPHS = {
    "function/row_scale.py": True,
    "modules/kinds/torch_linear.py": True,
    "passes/split_scale_pass.py": True,
    "ranks/groups.py": True,
    "cache/freshness.py": True,
    "backend.py": True,
    "app/errors.py": False,
    "attach/plan.py": False,
    "checkpoint/common_state.py": False,
    "files/bounds.py": False,
    "version.py": False,
}


def test_sources_that_shape_no_graph_leave_the_digest(tmp_path: Path) -> None:
    copied = tmp_path / "dora_fx"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of_sources(copied)
    assert before == source_digest()
    changed = {}
    for name in SHAPES_GRAPHS:
        text = (copied / name).read_text(encoding="utf-8")
        (copied / name).write_text(f"{text}# Another line.\n", encoding="utf-8")
        changed[name] = digest_of_sources(copied) != before
        (copied / name).write_text(text, encoding="utf-8")
    assert changed == SHAPES_GRAPHS
    (copied / "function" / "more.py").touch()
    assert digest_of_sources(copied) != before
