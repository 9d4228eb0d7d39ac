"""README's Python blocks run as they stand, in order, with what the text says is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import nn
from torch._dynamo.utils import counters

import dora_fx
from tests.distributed.bridge import adapter_shards, saving_on_cpu
from tests.models import SEQUENCE, sites, tiny_gpt, token_ids

README = Path(__file__).parents[2] / "README.md"


def batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = token_ids(SEQUENCE + 1, seed=seed)
    return {
        "input_ids": tokens[:, :-1],
        "position_ids": torch.arange(SEQUENCE).expand(len(tokens), -1),
        "attention_mask": torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None],
        "labels": tokens[:, 1:],
    }


def save_as_bridge(folder: Path, target_modules: list[str], **settings: Any) -> None:
    """An adapter of one rank: its keys, shapes and order of rows are Megatron-Bridge's."""
    model = dora_fx.DoRA(target_modules, **settings)(tiny_gpt(num_layers=1))
    folder.mkdir()
    with saving_on_cpu():
        dist_checkpointing.save(adapter_shards(model), str(folder))


def test_python_blocks_run_in_order(world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    gpt_model = tiny_gpt(num_layers=1)
    before = {name: value.clone() for name, value in gpt_model.named_parameters()}
    names: dict[str, Any] = {"gpt_model": gpt_model, "batches": [batch(1), batch(2)]}
    counters.clear()
    for number, block in enumerate(blocks):
        if number == len(blocks) - 1:
            dora = names["dora"]
            save_as_bridge(tmp_path / "bridge", dora.target_modules, dim=dora.dim, alpha=dora.alpha)
        exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
    model: nn.Module = names["model"]
    assert model is gpt_model and counters["dora_fx"]["sites_rewritten"] >= 4
    assert len(sites(gpt_model)) == 4
    assert names["extra"] == {"step": 100}
    assert len(names["optimizer"].state) == 12
    assert (tmp_path / "run" / "step_100" / "dora_fx.json").is_file()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    base = {
        name.replace(".to_wrap.", "."): value for name, value in gpt_model.named_parameters() if ".adapter" not in name
    }
    torch.testing.assert_close(base, before, rtol=0, atol=0)
