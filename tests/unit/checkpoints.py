"""What the tests of checkpoints share: small adapted models, and a look at what a directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx import CheckpointError
from tests.models import GPT_TARGETS, randomize_adapters, tiny_gpt, trainable

DIM, ALPHA = 4, 8


def adapted(seed: int, *, base_seed: int = 3, **settings: Any) -> nn.Module:
    """A one-layer GPT whose adapters depend on the seed."""
    torch.manual_seed(base_seed)
    dora = {"target_modules": GPT_TARGETS, "dim": DIM, "alpha": ALPHA} | settings
    model = dora_fx.DoRA(**dora)(tiny_gpt(num_layers=1))
    randomize_adapters(model, seed)
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def refusal(model: nn.Module, path: Path, **arguments: Any) -> str:
    """The message with which a load is refused; the model must be as it was."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError) as raised:
        dora_fx.load_checkpoint(model, path, **arguments)
    assert are_equal(before, dict(model.named_parameters()))
    return str(raised.value)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The adapters of a checkpoint, loaded into a model with others."""
    model = adapted(99)
    dora_fx.load_checkpoint(model, path)
    return values(model)


def leftovers(path: Path) -> list[str]:
    """What lies beside a checkpoint that belongs to it."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}"))
