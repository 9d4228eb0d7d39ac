"""The same tiny Llama with the same adapters under Hugging Face PEFT and under dora_fx."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_fx
from tests.closeness import assert_close, rounding, roundings_of
from tests.models import sites

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DIM, ALPHA, LEARNING_RATE = 4, 12, 1e-2
# In float64 both are rounded far below anything that one of them could do otherwise.
TOLERANCE = 1e-10


def tiny_llama(num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).double()


@torch.no_grad()
def peft_twin(base: nn.Module, **options: Any) -> nn.Module:
    """A PEFT model of the same base whose adapters are away from the identity."""
    settings = peft.LoraConfig(
        r=DIM, lora_alpha=ALPHA, use_dora=True, target_modules=TARGETS, lora_dropout=0.0, **options
    )
    twin = peft.get_peft_model(copy.deepcopy(base), settings)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
        elif "lora_magnitude" in name:
            parameter.mul_(1.0 + 0.5 * torch.rand_like(parameter))
    return twin


def peft_parameters(twin: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters under dora_fx's names."""
    renamed = {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            for theirs, ours in (
                ("lora_A.default.weight", "adapter.linear_in.weight"),
                ("lora_B.default.weight", "adapter.linear_out.weight"),
                ("lora_magnitude_vector.default.weight", "adapter.weight_magnitude"),
            ):
                name = name.replace(theirs, ours)
            renamed[name] = parameter
    return renamed


def our_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.usefixtures("world")
# The graph has what layers share, two of them have kernels that one has.
@pytest.mark.parametrize(("compiler", "num_layers"), [(None, 2), ("aot_eager", 2), ("inductor", 1)])
def test_logits_gradients_and_trained_parameters_agree_with_peft(compiler: str | None, num_layers: int) -> None:
    base = tiny_llama(num_layers)
    twin = peft_twin(base)
    model = dora_fx.DoRA(TARGETS, dim=DIM, alpha=ALPHA)(base)
    ours, theirs = our_parameters(model), peft_parameters(twin)
    assert ours.keys() == theirs.keys()
    assert len(sites(model)) == num_layers * len(TARGETS)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    # Transformers takes norms and angles in float32 whatever the dtype, and Inductor rounds those in its own way.
    bound = rounding(torch.float32, 3 * roundings_of(model)) if compiler == "inductor" else TOLERANCE
    if compiler is not None:
        model.compile(backend="dora_fx", options={"inner_compiler": compiler})
    tokens = torch.randint(0, 64, (2, 10))
    optimizers = [torch.optim.AdamW(p.values(), lr=LEARNING_RATE) for p in (ours, theirs)]
    for step in range(3):
        logits = []
        for network, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            output = network(input_ids=tokens, labels=tokens)
            output.loss.backward()
            logits.append(output.logits.detach())
        assert_close(*logits, bound)
        if step == 0:
            assert_close(*({name: p.grad for name, p in each.items()} for each in (ours, theirs)), bound)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(ours, theirs, bound)


PATTERNS = dict(ranks={"k_proj": 2, "*.layers.0.*": 8}, alphas={"up_proj": 5, "*.layers.1.mlp.*": 20})
# The same for PEFT, whose patterns are regular expressions of a path's end.
PEFT_PATTERNS = dict(
    rank_pattern={"k_proj": 2, r"layers\.0\..*": 8}, alpha_pattern={"up_proj": 5, r"layers\.1\.mlp\..*": 20}
)


def patterned_twins(use_rslora: bool) -> tuple[nn.Module, nn.Module]:
    """A PEFT model with ranks and alphas by patterns, and ours with the same parameters."""
    base = tiny_llama(2)
    twin = peft_twin(base, use_rslora=use_rslora, **PEFT_PATTERNS)
    dora = dora_fx.DoRA(TARGETS, dim=DIM, alpha=ALPHA, use_rslora=use_rslora)
    dora.rank_pattern, dora.alpha_pattern = PATTERNS["ranks"], PATTERNS["alphas"]
    model = dora(base)
    ours, theirs = our_parameters(model), peft_parameters(twin)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    return model, twin


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_and_rslora_agree_with_peft(use_rslora: bool) -> None:
    model, twin = patterned_twins(use_rslora)
    assert len({site.scaling for site in sites(model).values()}) == 6
    found = []
    tokens = torch.randint(0, 64, (2, 10))
    for network in (model, twin):
        output = network(input_ids=tokens, labels=tokens)
        output.loss.backward()
        found.append({"logits": output.logits.detach()})
    for output_of, parameters in zip(found, (our_parameters(model), peft_parameters(twin)), strict=True):
        output_of |= {name: parameter.grad for name, parameter in parameters.items()}
    assert_close(*found, TOLERANCE)


@pytest.mark.usefixtures("world")
def test_learning_rate_ratios_agree_with_peft() -> None:
    """PEFT gives magnitudes the rate of B, and no decay unless asked; a scheduler of torch's keeps the ratios."""
    model, twin = patterned_twins(use_rslora=False)
    theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=4.0)
    ratios = dict(loraplus_lr_ratio=4.0, magnitude_lr_ratio=4.0)
    groups = dora_fx.parameter_groups(model, LEARNING_RATE, weight_decay=0.0, **ratios)
    optimizers = torch.optim.AdamW(groups), theirs
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    tokens = torch.randint(0, 64, (2, 10))
    for _ in range(3):
        for network, optimizer, scheduler in zip((model, twin), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            network(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            scheduler.step()
    assert_close(our_parameters(model), peft_parameters(twin), TOLERANCE)


@pytest.mark.usefixtures("world")
def test_magnitudes_have_a_rate_of_their_own_and_no_decay() -> None:
    model, _ = patterned_twins(use_rslora=False)
    groups = dora_fx.parameter_groups(model, 0.1, weight_decay=0.3, loraplus_lr_ratio=2.0, magnitude_lr_ratio=0.5)
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in torch.optim.AdamW(groups).param_groups
        for parameter in group["params"]
    }
    expected = {"linear_in.weight": (0.1, 0.3), "linear_out.weight": (0.2, 0.3), "weight_magnitude": (0.05, 0.0)}
    assert len(rates) == 3 * len(sites(model))
    for name, parameter in our_parameters(model).items():
        assert rates[id(parameter)] == expected[name.partition(".adapter.")[2]]
    for options, message in (
        (dict(lr=0.1, loraplus_lr_ratio=0), "loraplus_lr_ratio: found 0, expected a positive finite number"),
        (dict(loraplus_lr_ratio=2), "lr: found None, expected the learning rate that the ratios multiply"),
        (dict(lr=-1.0), "lr: found -1.0, expected a finite number of at least 0"),
        (dict(lr=0.1, weight_decay=float("nan")), "weight_decay: found nan, expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            dora_fx.parameter_groups(model, **options)


@pytest.mark.usefixtures("world")
def test_groups_leave_to_the_optimizer_what_they_do_not_say(caplog: pytest.LogCaptureFixture) -> None:
    """With gradients of zero only decay moves a parameter: by lr * weight_decay of itself."""
    for options, rate, decay in (
        (dict(lr=0.1, loraplus_lr_ratio=16.0), 0.1, 0.5),
        (dict(), 0.2, 0.5),
        (dict(lr=0.1, weight_decay=0.25), 0.1, 0.25),
        (dict(weight_decay=0.0), 0.2, 0.0),
    ):
        model, _ = patterned_twins(use_rslora=False)
        before = {name: parameter.detach().clone() for name, parameter in our_parameters(model).items()}
        optimizer = torch.optim.AdamW(dora_fx.parameter_groups(model, **options), lr=0.2, weight_decay=0.5)
        for parameter in our_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in our_parameters(model).items():
            ratio = options.get("loraplus_lr_ratio", 1.0) if name.endswith("linear_out.weight") else 1.0
            kept = 1.0 if name.endswith("weight_magnitude") else 1.0 - rate * ratio * decay
            assert_close(parameter.detach(), kept * before[name], TOLERANCE)
    assert not [record for record in caplog.records if record.name == "dora_fx.attach.learning_rates"]
    next(parameter for name, parameter in model.named_parameters() if "norm" in name).requires_grad_()
    dora_fx.parameter_groups(model)
    assert "found 1 trainable parameters outside adapters" in caplog.text and "norm.weight; add" in caplog.text
