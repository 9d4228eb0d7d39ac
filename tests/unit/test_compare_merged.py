"""`compare_merged` says what merging in a serving dtype changes, per layer and of log-probabilities."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx.attach.merged_weights import merged_weight
from dora_fx.hf import MergedComparison
from dora_fx.models import causal_mask
from tests.hf_models import tiny_hf_model
from tests.models import randomize_adapters, sites
from tests.peft_models import TOKENS, adapted_megatron

pytestmark = pytest.mark.usefixtures("world")

POSITIONS = torch.arange(TOKENS.shape[1] - 1).expand(len(TOKENS), -1)
MEGATRON_BATCH = dict(
    input_ids=TOKENS[:, :-1],
    position_ids=POSITIONS,
    attention_mask=causal_mask(TOKENS.shape[1] - 1, "cpu"),
    labels=TOKENS[:, 1:],
)


def adapted(dtype: torch.dtype = torch.float32) -> Any:
    model = dora_fx.DoRA("all-linear", dim=4, alpha=12, dropout=0.1)(tiny_hf_model())
    randomize_adapters(model)
    return model.to(dtype)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def log_probs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits[:, :-1].float().log_softmax(-1).gather(2, TOKENS[:, 1:, None])


@pytest.mark.parametrize("compiled", [False, True])
def test_gaps_are_those_of_a_model_that_was_merged_by_hand(compiled: bool) -> None:
    model = adapted()
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="dora_fx", options={"inner_compiler": "eager"})
    model.train()
    before = state(model)
    found = dora_fx.compare_merged(model, TOKENS, dtype=torch.bfloat16)
    assert model.training and all(module.training for module in model.modules())
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert [gap.path for gap in found.layers] == list(sites(model))
    served = copy.deepcopy(model)
    with torch.no_grad():
        for site in sites(served).values():
            weight = merged_weight(site)
            site.to_wrap.weight.copy_(weight.bfloat16())
            site.disable_adapter_layers()
    with torch.compiler.set_stance("force_eager"):
        gaps = (log_probs(model) - log_probs(served)).abs().double()
    assert found.num_tokens == gaps.numel() == 36
    assert found.mean_gap == pytest.approx(gaps.mean().item(), rel=1e-12) and found.mean_gap > 0
    assert found.max_gap == pytest.approx(gaps.max().item(), rel=1e-12)
    for gap in found.layers:
        site = sites(model)[gap.path]
        exact, base = merged_weight(site), site.base_weight.detach()
        assert gap.change == pytest.approx(((exact - base).norm() / base.norm()).item(), rel=1e-5)
        assert gap.lost == pytest.approx(((exact.bfloat16() - exact).norm() / (exact - base).norm()).item(), rel=1e-5)
        put_back = (exact.bfloat16() == base.bfloat16()) & (exact != base)
        assert gap.unmoved == pytest.approx(put_back.sum().item() / (exact != base).sum().item(), rel=1e-12)
        # Rounding to eight bits is off by 2^-9 at most, and by no less than a hundredth of it on average.
        assert 2**-16 < gap.output_gap < 1


def test_what_rounding_takes_back_is_seen() -> None:
    """Adapters that train their weights by less than half a unit in the last place of bfloat16 are lost whole."""
    model = dora_fx.DoRA("all-linear", dim=4)(tiny_hf_model().bfloat16())
    with torch.no_grad():
        for site in sites(model).values():
            site.adapter.weight_magnitude.mul_(1 + 2**-12)
    lost = dora_fx.compare_merged(model, TOKENS)
    assert lost.dtypes == (torch.bfloat16,)
    for gap in lost.layers:
        assert gap.unmoved == 1 and gap.lost == pytest.approx(1, rel=1e-6)
        assert gap.change == pytest.approx(2**-12, rel=1e-3)
    wide = dora_fx.compare_merged(adapted(), TOKENS)
    # Half a unit in the last place of float32, over a change that is a good part of the weight.
    assert all(gap.unmoved < 0.01 and gap.lost < 1e-6 and gap.output_gap < 1e-4 for gap in wide.layers)


def test_an_untrained_adapter_has_no_gap() -> None:
    model = dora_fx.DoRA("all-linear", dim=4)(tiny_hf_model())
    found = dora_fx.compare_merged(model, input_ids=TOKENS)
    assert all((gap.change, gap.lost, gap.unmoved, gap.output_gap) == (0, 0, 0, 0) for gap in found.layers)
    assert (found.mean_gap, found.max_gap) == (0, 0)


def test_padding_counts_for_nothing() -> None:
    model, mask = adapted(), torch.ones_like(TOKENS)
    mask[1, 10:] = 0
    found = dora_fx.compare_merged(model, TOKENS, attention_mask=mask, dtype=torch.bfloat16)
    assert found.num_tokens == 18 + 9
    assert found.mean_gap > 0


def test_a_megatron_model_has_the_log_probabilities_of_its_hugging_face_twin() -> None:
    """The layers are fused otherwise, and so are their rows rounded alike."""
    model = adapted_megatron(tiny_hf_model())
    found = dora_fx.compare_merged(model, **MEGATRON_BATCH, dtype=torch.bfloat16)
    twin = tiny_hf_model()
    twin.load_state_dict(dict(dora_fx.iter_merged(model)))
    exact = log_probs(twin)
    twin.load_state_dict(dict(dora_fx.iter_merged(model, dtype=torch.bfloat16)))
    for name, value in tiny_hf_model().state_dict().items():
        if "proj" not in name:
            twin.state_dict()[name].copy_(value)
    gaps = (log_probs(twin) - exact).abs()
    assert found.num_tokens == gaps.numel()
    # Both models compute in float32, whose rounding is a thousandth of bfloat16's.
    assert found.mean_gap == pytest.approx(gaps.mean().item(), rel=0.02)
    assert [gap.path for gap in found.layers] == list(sites(model))


def test_the_table_names_every_layer() -> None:
    text = str(dora_fx.compare_merged(adapted(), TOKENS, dtype=torch.bfloat16))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "change", "lost", "unmoved", "output", "gap"]
    assert len(lines) == 1 + 14 + 1 and lines[1].startswith("model.layers.0.self_attn.q_proj  ")
    assert lines[-1].startswith("log-probabilities of 36 tokens, merged in bfloat16: mean gap ")


def test_a_run_that_gives_no_log_probabilities() -> None:
    found = dora_fx.compare_merged(adapted(), log_probs=lambda: None)
    assert isinstance(found, MergedComparison) and found.num_tokens == 0 and math.isnan(found.mean_gap)
    assert all(math.isnan(gap.output_gap) and gap.change > 0 for gap in found.layers)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"q_proj: found dtype=torch.float32 for a weight in torch.bfloat16, expected"):
        dora_fx.compare_merged(adapted(torch.bfloat16), TOKENS, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"input_ids: found none, expected tokens \[b, s\]"):
        dora_fx.compare_merged(adapted(), inputs_embeds=torch.zeros(1, 2, 48))
    with pytest.raises(ValueError, match="labels: found none, expected those of the tokens"):
        dora_fx.compare_merged(adapted_megatron(tiny_hf_model()), **{**MEGATRON_BATCH, "labels": None})
    with pytest.raises(ValueError, match="found no adapted layer"):
        dora_fx.compare_merged(tiny_hf_model(), TOKENS)
    disabled = adapted()
    next(iter(sites(disabled).values())).disable_adapter_layers()
    with pytest.raises(ValueError, match="the adapter is disabled"):
        dora_fx.compare_merged(disabled, TOKENS)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = adapted().train()
    before = state(model)
    calls = []

    def fails_when_merged() -> torch.Tensor:
        calls.append(len(sites(model)))
        if not calls[-1]:
            raise KeyError("merged")
        return log_probs(model)

    with pytest.raises(KeyError, match="merged"):
        dora_fx.compare_merged(model, log_probs=fails_when_merged)
    assert calls == [14, 0]
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert model.training and not any(module._forward_hooks for module in sites(model).values())
