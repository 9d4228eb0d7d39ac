"""`dora_fx.check` on models of transformers and of anybody, on what it prints, and on what it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from tests.hf_models import tiny_hf_model
from tests.models import randomize_adapters

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(8))


def hf_set_up(**dora: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_hf_model("llama").train()
    dora_fx.DoRA(target_modules="all-linear", dim=4, **dora)(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def test_a_transformers_model_passes_and_the_report_says_what_was_seen():
    model, optimizer = hf_set_up()
    randomize_adapters(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = dora_fx.check(model, dict(input_ids=TOKENS, labels=TOKENS), optimizer)
    assert not report.failed
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not optimizer.state
    lines = str(report).splitlines()
    assert lines[0].startswith(
        "ok      optimizer        all 42 adapter tensors and nothing else; lr 0.001, weight decay"
    )
    assert any(line.startswith("ok      slope ") for line in lines)
    assert lines[-1].startswith("nothing is wrong; loss ")
    again = dora_fx.check(model, dict(input_ids=TOKENS, labels=TOKENS), reference=report.loss)
    assert {finding.name: finding.verdict for finding in again.findings}["reference"] == "ok"


def test_another_model_with_the_same_adapters_is_a_reference():
    batch = dict(input_ids=TOKENS, labels=TOKENS)
    for seed, verdict in ((1, "ok"), (2, "failed")):
        (model, _), (other, _) = hf_set_up(), hf_set_up()
        randomize_adapters(model)
        randomize_adapters(other, seed)
        report = dora_fx.check(model, batch, reference=other, raises=False)
        assert {finding.name: finding.verdict for finding in report.findings}["reference"] == verdict
    # A handle on the model shares its adapters, which are moved for the proofs and moved back.
    report = dora_fx.check(model, batch, reference=torch.nn.Sequential(model)[0], raises=False)
    assert {finding.name: finding.verdict for finding in report.findings}["reference"] == "ok"


def test_recomputation_of_transformers_is_compared_with_none():
    for reentrant, verdict in ((False, "ok"), (True, "ok")):
        model, optimizer = hf_set_up()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        report = dora_fx.check(model, dict(input_ids=TOKENS, labels=TOKENS), optimizer)
        assert {finding.name: finding.verdict for finding in report.findings}["recomputation"] == verdict


def test_what_fails_is_an_error_that_names_the_layer_and_has_the_report():
    model, optimizer = hf_set_up()
    name = "model.layers.1.mlp.down_proj.adapter.weight_magnitude"
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(dora_fx.CheckError, match=f"^optimizer: {name}: found frozen, expected") as error:
        dora_fx.check(model, dict(input_ids=TOKENS, labels=TOKENS), optimizer)
    assert error.value.report is not None and {f.name for f in error.value.report.failed} == {"optimizer", "gradients"}


def test_what_cannot_be_run_is_named():
    model, optimizer = hf_set_up()
    with pytest.raises(dora_fx.CheckError, match="returned a CausalLMOutputWithPast without a loss, expected labels"):
        dora_fx.check(model, dict(input_ids=TOKENS), optimizer)
    with pytest.raises(ValueError, match="found no adapted layer"):
        dora_fx.check(nn.Linear(2, 2), torch.ones(1, 2))


def test_passes_of_ones_own_take_the_place_of_the_usual_ones():
    model = dora_fx.DoRA(target_modules=["0", "2"], dim=2)(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    x, y = torch.randn(4, 6), torch.randn(4, 3)

    def forward_backward(model: nn.Module, batch: Any) -> float:
        loss = (model(batch[0]) - batch[1]).square().mean()
        loss.backward()
        return loss.item()

    report = dora_fx.check(
        model, (x, y), optimizer, forward_backward=forward_backward, forward=lambda model, batch: model(batch[0])
    )
    assert {finding.name: finding.verdict for finding in report.findings}["slope"] == "ok"
