"""`dora_fx.check` on models of Transformer Engine's layers with emulated kernels, on two tensor-parallel ranks."""

from __future__ import annotations

import pytest
import torch

import dora_fx
from dora_fx.models import causal_mask
from tests.distributed.launch import run_ranks
from tests.distributed.spec_models import TOKENS, adapted
from tests.unit.test_specs import HAS_HYBRID_MODEL

SPECS = ["te", "hybrid"] if HAS_HYBRID_MODEL else ["te"]
pytestmark = pytest.mark.usefixtures("emulated_te")


def reports_of(specs: list[str]) -> dict[str, list[tuple[str, str, str]]]:
    found = {}
    # An even length, as ranks have a part of it each.
    inputs, labels = TOKENS[:, :-2], TOKENS[:, 1:-1]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    mask = causal_mask(inputs.shape[1], "cpu")
    batch = dict(input_ids=inputs, position_ids=positions, attention_mask=mask, labels=labels)
    for spec in specs:
        model = adapted("llama", spec, sequence_parallel=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        report = dora_fx.check(model, batch, optimizer, raises=False)
        found[spec] = [(finding.name, finding.verdict, finding.text) for finding in report.findings]
    return found


def test_models_of_every_spec_pass_emulated_kernels():
    for spec, findings in run_ranks(reports_of, 2, 2, SPECS).items():
        failed = [finding for finding in findings if finding[1] == "failed"]
        assert not failed, f"{spec}: {failed}"
        assert {name for name, verdict, _ in findings if verdict == "ok"} >= {"gradients", "slope", "steps", "merged"}
