"""A layer whose process group is gone says so."""

from __future__ import annotations

import pytest
import torch

from tests.graph.conftest import fake_world
from tests.graph.sites import IN, adapted, row


def test_a_destroyed_group_is_named():
    with fake_world(2):
        model = adapted(row(tensor_model_parallel_size=2))
        group = model.linear.adapter.tp_group
    with pytest.raises(RuntimeError, match=f"found no tensor-parallel process group '{group}'.* was it destroyed"):
        model(torch.randn(3, 1, IN // 2))
