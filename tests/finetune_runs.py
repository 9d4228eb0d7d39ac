"""Run `dora-fx finetune` in this process, and read what its run folder says."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dora_fx.app.cli.main import main
from tests.closeness import roundings_of
from tests.hf_models import tiny_hf_model

# Forward and backward of the base that `finetune_inputs` writes. Each step adds its own to what it trains.
ROUNDINGS_OF_A_STEP = 3 * roundings_of(tiny_hf_model())


def finetune(*arguments: object) -> int:
    """Run the command in this process, with nothing compiled left of an earlier run."""
    torch._dynamo.reset()
    return main(["finetune", *map(str, arguments)])


def rows(run: Path, key: str = "loss") -> dict[int, float]:
    """Steps and values of one kind of row of metrics.jsonl, each step at most once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def step_of(run: Path) -> int:
    """The step that a run would go on after."""
    return torch.load(run / "checkpoint" / "common.pt", weights_only=True)["extra"]["step"]
