"""A checkpoint is little larger than its tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import dora_fx
from benchmarks.bench_checkpoint import build
from dora_fx.checkpoint.manifest import read_manifest


@pytest.mark.slow
def test_smollm2_at_rank_16(tmp_path: Path, world: None) -> None:
    path = tmp_path / "checkpoint"
    dora_fx.save_checkpoint(build(tp=1, dim=16), path)
    tensors = read_manifest(path).tensors.values()
    whole = sum(math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize for tensor in tensors)
    assert whole == 16_842_240
    assert sum(file.stat().st_size for file in path.iterdir()) <= 1.01 * whole
