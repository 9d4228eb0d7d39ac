"""A layer that no gradient reached is named at the first step of an optimizer, and once."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dora_fx


class TwoLayers(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "swallowed":
            return self.second(checkpoint(self.first, x, use_reentrant=True))
        if self.how == "detached":
            return self.second(self.first(x).detach())
        return self.second(x if self.how == "not called" else self.first(x))


def model_and_optimizer(how: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = dora_fx.DoRA(target_modules=["first", "second"], dim=2)(TwoLayers(how))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_without_a_gradient_are_named_once(caplog):
    for how in ("swallowed", "detached", "not called"):
        model, optimizer = model_and_optimizer(how)
        caplog.clear()
        for _ in range(2):
            model(torch.ones(3, 6)).square().mean().backward()
            optimizer.step()
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(messages) == 1, how
        assert messages[0].startswith("first: found no gradient in 1 of 2 adapted layers"), how


def test_nothing_is_said_where_all_layers_train_or_are_frozen_or_belong_to_another_optimizer(caplog):
    model, optimizer = model_and_optimizer("whole")
    other = nn.Linear(2, 2)
    torch.optim.SGD(other.parameters()).step()
    model.get_submodule("first.adapter").requires_grad_(False)
    model(torch.ones(3, 6)).square().mean().backward()
    optimizer.step()
    assert not caplog.records


def test_a_closure_is_waited_for(caplog):
    model, _ = model_and_optimizer("detached")
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 6)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not caplog.records
