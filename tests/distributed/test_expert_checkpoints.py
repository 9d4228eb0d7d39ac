"""A checkpoint of experts saved at one layout and loaded at another holds the same bits, optimizer state included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pipeline_gpt import Kind, Layout
from tests.distributed.test_checkpoint_reshaping import reshape

LAYOUTS = [
    Layout(),
    Layout(dp=2, ep=2),
    Layout(tp=2, etp=1),
    Layout(tp=2, ep=2, etp=1),
    Layout(pp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=2),
    Layout(tp=2, dp=2, ep=4, etp=1),
]
KINDS = [Kind(experts=True, sequence_parallel=True, optimizer=name) for name in ("fp32", "bf16", "distributed")]


def test_few_layouts(tmp_path: Path) -> None:
    assert reshape([Layout(tp=2), *LAYOUTS[1:4:2]], KINDS[:1], tmp_path) == 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_pair_of_layouts(kind: Kind, tmp_path: Path) -> None:
    assert reshape(LAYOUTS, [kind], tmp_path) == 49
