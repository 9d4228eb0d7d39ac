"""Experts of Transformer Engine's spec: its own Python, with emulated kernels, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dora_fx
from dora_fx.models import build_gpt_model
from tests.closeness import assert_apart, assert_close, rounding, roundings_of
from tests.distributed.launch import visit_worlds
from tests.distributed.moe_layers import ExpertLayout
from tests.distributed.test_moe_models import KINDS, TOKENS, logits_of
from tests.hf_models import tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters
from tests.peft_models import hf_logits

pytestmark = pytest.mark.usefixtures("emulated_te")
LAYOUTS = [ExpertLayout(), ExpertLayout(2, ep=2), ExpertLayout(2, tp=2, etp=2)]


def visit(layout: ExpertLayout, folder: Path) -> None:
    """Build each model; the first layout writes adapters that every one imports and streams."""
    for kind in KINDS:
        hf = tiny_hf_model(kind)
        model = build_gpt_model(hf.config, hf.state_dict(), spec="te", sequence_parallel=layout.tp > 1)
        found: dict[str, Any] = {"base": logits_of(model)}
        if layout == LAYOUTS[0]:
            adapted = dora_fx.DoRA(GPT_TARGETS, dim=4)(build_gpt_model(hf.config, hf.state_dict(), spec="te"))
            randomize_adapters(adapted)
            dora_fx.export_hf(adapted, folder / kind)
        dora_fx.import_hf(model, folder / kind)
        found["logits"] = logits_of(model)
        found["adapter"], found["merged"] = dict(dora_fx.iter_adapter(model)), dict(dora_fx.iter_merged(model))
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind} {layout}.pt")


def test_every_layout_computes_and_writes_what_one_rank_does_emulated_kernels(tmp_path: Path) -> None:
    visit_worlds([(visit, layout) for layout in LAYOUTS], tmp_path)
    for kind in KINDS:
        hf = tiny_hf_model(kind)
        bound = rounding(torch.float32, 2 * roundings_of(hf))
        first, *others = (torch.load(tmp_path / f"{kind} {layout}.pt") for layout in LAYOUTS)
        assert_apart(first["logits"], first["base"])
        for found in (first, *others):
            assert_close(found["base"], hf_logits(hf, TOKENS), bound)
        for found in others:
            assert_close(found["logits"], first["logits"], bound)
            torch.testing.assert_close(found["adapter"], first["adapter"], rtol=0, atol=0)
            torch.testing.assert_close(found["merged"], first["merged"], rtol=1e-6, atol=1e-6)
