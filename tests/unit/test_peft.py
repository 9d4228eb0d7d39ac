"""The same tiny Llama with the same adapters under Hugging Face PEFT and under dora_fx."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
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
def peft_twin(base: nn.Module) -> nn.Module:
    """A PEFT model of the same base whose adapters are away from the identity."""
    settings = peft.LoraConfig(r=DIM, lora_alpha=ALPHA, use_dora=True, target_modules=TARGETS, lora_dropout=0.0)
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
