"""PEFT DoRA adapters with nothing at its initial value, and Megatron models to compare them with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import dora_fx
from dora_fx.models import build_gpt_model, causal_mask
from tests.closeness import assert_close, rounding, roundings_of
from tests.hf_models import CONFIGS, SHAPE, tiny_hf_model
from tests.models import GPT_TARGETS, randomize_adapters

HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of a family that no Megatron model is built for: norms of its own, a scaled embedding that the output layer shares.
_GEMMA = SHAPE | dict(head_dim=8, pad_token_id=0)
TOKENS = torch.randint(0, 64, (2, 19), generator=torch.Generator().manual_seed(8))


def base_model(kind: str = "llama") -> Any:
    """A tiny transformers model of a kind in `CONFIGS`, or "gemma"."""
    if kind in CONFIGS:
        return tiny_hf_model(kind)
    torch.manual_seed(3)
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_GEMMA)).eval()


def hf_targets(base: nn.Module) -> list[str]:
    """Names of all linear layers of a model, without the output layer."""
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - {"lm_head"})


def megatron_logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, causal_mask(tokens.shape[1], "cpu"))


def hf_logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


@torch.no_grad()
def save_peft_adapter(base: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Write an adapter of its own for every target of `base`; returns the PEFT model."""
    defaults = dict(r=4, lora_alpha=12, use_dora=True, target_modules=hf_targets(base), task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**(defaults | settings)))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        elif "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif "lora_magnitude" in name:
            parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    # PEFT would add a copy of an adapted lm_head's base weight.
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def load_with_peft(base: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model of an adapter; any warning is an error but what PEFT is told about its own calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))


def beside_peft(found: nn.Module, expected: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the loss and all gradients of a transformers model adapted here, and PEFT's, by the same names.

    PEFT gives the whole product's dropout a form of its own; without dropout the functions are the same.
    """
    parts: list[dict[str, torch.Tensor]] = []
    for model in (found, expected):
        loss = model.train()(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        parts.append({"loss": loss.detach()} | gradients)
    names = {"lora_A.default.weight": "linear_in.weight", "lora_B.default.weight": "linear_out.weight"}
    names["lora_magnitude_vector.default.weight"] = "weight_magnitude"
    theirs = {}
    for name, value in parts[1].items():
        path, _, end = name.removeprefix("base_model.model.").partition(".lora_")
        theirs[f"{path}.adapter.{names['lora_' + end]}" if end else path] = value
    return parts[0], theirs


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, *models: nn.Module) -> None:
    """Compare logits of two float32 models that compute the same; the larger one of the two is among `models`."""
    assert_close(found, expected, rounding(torch.float32, roundings_of(*models)))


def megatron_of(hf: nn.Module, **settings: Any) -> nn.Module:
    return build_gpt_model(hf.config, hf.state_dict(), **settings)


def adapted_megatron(hf: nn.Module, targets: list[str] | None = None, **settings: Any) -> nn.Module:
    """A Megatron model of `hf` with adapters that are away from the identity."""
    model = dora_fx.DoRA(targets or GPT_TARGETS, dim=4, alpha=12, dropout=0.05)(megatron_of(hf, **settings))
    randomize_adapters(model)
    return model


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".adapter." in name}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
