"""Plain torch optimizers in checkpoints, on one rank: training goes on bitwise, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.lr_scheduler import LinearLR

import dora_fx
from dora_fx import CheckpointError
from dora_fx.checkpoint import read_adapters
from tests.models import GPT_TARGETS, logits_of, randomize_adapters, tiny_gpt, token_ids, trainable
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adamw_amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adam_tensor_lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, dampening=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=1e-2),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=1e-2),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, centered=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=1e-3),
}


def adapted(seed: int = 1, bf16: bool = False) -> Any:
    torch.manual_seed(3)
    precision = dict(bf16=True, params_dtype=torch.bfloat16) if bf16 else {}
    model = dora_fx.DoRA(GPT_TARGETS, dim=4)(tiny_gpt(**precision))
    randomize_adapters(model, seed)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    logits_of(model, token_ids(seed=number)).float().square().mean().backward()
    optimizer.step()


def trained(make: Make, steps: int, seed: int = 1, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = adapted(seed, **settings)
    optimizer = make(list(trainable(model).values()))
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    state = optimizer.state_dict()
    return [value.detach().clone() for value in trainable(model).values()], state["state"], state["param_groups"]


def assert_same(found: Any, expected: Any) -> None:
    assert (list(found[1]), found[2]) == (list(expected[1]), expected[2])
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)


# One of each kind of state: none, tensors of the parameter's shape, numbers as tensors, and a rate that is a tensor.
BFLOAT16 = ["adamw", "adam_tensor_lr", "sgd", "sgd_momentum", "asgd", "nadam"]


@pytest.mark.parametrize(("name", "bf16"), [*((name, False) for name in OPTIMIZERS), *((n, True) for n in BFLOAT16)])
def test_training_goes_on_as_if_it_had_not_stopped(name: str, bf16: bool, tmp_path: Path) -> None:
    make = OPTIMIZERS[name]
    whole = trained(make, 2, bf16=bf16)
    dora_fx.save_checkpoint(whole[0], tmp_path / "checkpoint", whole[1], extra={"step": 2})
    for steps_before in (0, 3):
        resumed = trained(make, steps_before, seed=2, bf16=bf16)
        for group in resumed[1].param_groups:
            group["lr"] = 0.5
        assert dora_fx.load_checkpoint(resumed[0], tmp_path / "checkpoint", resumed[1]) == {"step": 2}
        assert_same(everything(*resumed), everything(*whole))
    for number in (2, 3):
        step(*whole, number)
        step(*resumed, number)
    assert_same(everything(*resumed), everything(*whole))


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum"])
def test_an_optimizer_that_took_no_step(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(OPTIMIZERS[name], 0)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer)
    assert not optimizer.state
    other = trained(OPTIMIZERS[name], 2, seed=2)
    dora_fx.load_checkpoint(other[0], tmp_path / "checkpoint", other[1])
    assert_same(everything(*other), everything(model, optimizer))


def test_parameters_without_a_gradient_have_no_state(tmp_path: Path) -> None:
    def make(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        # Of the first layer's factors, as a user freezes lower layers.
        for parameter in parameters[:5]:
            parameter.requires_grad_(False)
        return torch.optim.AdamW(parameters, lr=1e-2)

    model, optimizer = trained(make, 2)
    assert len(optimizer.state) == 24 - 5
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer)
    other = trained(make, 0, seed=2)
    dora_fx.load_checkpoint(other[0], tmp_path / "checkpoint", other[1])
    assert other[1].state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    torch.testing.assert_close(other[1].state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Magnitudes with another learning rate, named as torch allows it, and the frozen base among the others."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, value) for name, value in named if "magnitude" not in name], "lr": 1e-2},
        {"params": [(name, value) for name, value in named if "magnitude" in name], "lr": 1e-3, "note": "magnitudes"},
    ]


def test_groups_and_a_frozen_base_among_the_parameters(tmp_path: Path) -> None:
    model, other = adapted(), adapted(seed=2)
    optimizer, resumed = torch.optim.AdamW(groups_of(model)), torch.optim.AdamW(groups_of(other))
    scheduler = LinearLR(optimizer, 0.5)
    step(model, optimizer, 0)
    scheduler.step()
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer, extra=scheduler.state_dict())
    state = dora_fx.load_checkpoint(other, tmp_path / "checkpoint", resumed)
    assert_same(everything(other, resumed), everything(model, optimizer))
    assert [group["note"] for group in resumed.param_groups[1:]] == ["magnitudes"]
    again = LinearLR(resumed, 0.5)
    again.load_state_dict(state)
    assert again.state_dict() == scheduler.state_dict()


def test_readers_of_adapters_alone_pass_over_the_state(tmp_path: Path) -> None:
    model, optimizer = trained(OPTIMIZERS["adamw"], 1)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer)
    other = adapted(seed=2)
    dora_fx.load_checkpoint(other, tmp_path / "checkpoint")
    torch.testing.assert_close(trainable(other), trainable(model), rtol=0, atol=0)
    layers = read_adapters(tmp_path / "checkpoint")
    plain = {f"{path}.adapter.{name}": value for path, layer in layers.items() for name, value in layer.tensors.items()}
    torch.testing.assert_close(
        plain, {name: value.detach() for name, value in trainable(model).items()}, rtol=0, atol=0
    )


def test_compiled_and_wrapped_models_have_the_same_keys(tmp_path: Path) -> None:
    model = torch.compile(adapted(), backend="eager")
    optimizer = torch.optim.AdamW(list(trainable(model).values()))
    step(model, optimizer, 0)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer)
    other = trained(OPTIMIZERS["adamw"], 0, seed=2)
    dora_fx.load_checkpoint(other[0], tmp_path / "checkpoint", other[1])
    assert_same(everything(*other), everything(model, optimizer))


class KeepsMore(torch.optim.SGD):
    """Has one more state of each parameter."""

    def __init__(self, parameters: Iterable[Any], extra: Any, **settings: Any) -> None:
        super().__init__(parameters, lr=1e-2, momentum=0.9, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["more"] = extra


def refuse_to_save(message: str, model: nn.Module, optimizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        dora_fx.save_checkpoint(model, tmp_path / "checkpoint", optimizer)
    assert not list(tmp_path.iterdir())


@every_case(
    ("extra", "found"),
    [
        (torch.zeros(2, 3), r"a torch.float32 tensor of shape \(2, 3\)"),
        (torch.zeros((), dtype=torch.complex64), "a torch.complex64 tensor"),
        ({"moments": torch.zeros(2)}, "a builtins.dict"),
        ([torch.zeros(4)], r"a torch.float32 tensor of shape \(4,\)"),
        (object(), "a builtins.object"),
    ],
    ids=["shape", "complex", "dict", "list", "object"],
)
def test_state_that_cannot_be_moved(extra: Any, found: str, tmp_path: Path) -> None:
    model, optimizer = trained(lambda parameters: KeepsMore(parameters, extra), 1)
    name = r"decoder\.layers\.0\.self_attention\.linear_\w+\.adapter\.\S+"
    refuse_to_save(f"{name}: the state 'more' of KeepsMore is {found}.*expected tensors", model, optimizer, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), r"the state 'row_var' of Adafactor is a torch.float32 tensor of"),
        (lambda p: torch.optim.LBFGS(p, max_iter=2), "of LBFGS is a"),
    ],
    ids=["adafactor", "lbfgs"],
)
def test_optimizers_that_keep_other_things(make: Make, message: str, tmp_path: Path) -> None:
    model = adapted()
    optimizer = make(list(trainable(model).values()))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = logits_of(model, token_ids()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    refuse_to_save(message, model, optimizer, tmp_path)


def test_what_no_checkpoint_of_adapters_has(tmp_path: Path) -> None:
    model = adapted()
    model.decoder.final_layernorm.weight.requires_grad_(True)
    every = torch.optim.AdamW(model.parameters())
    refuse_to_save(
        r"decoder\.final_layernorm\.weight: found it in AdamW, expected adapters alone", model, every, tmp_path
    )
    model = adapted()
    stranger = torch.optim.AdamW([nn.Parameter(torch.zeros(3, 7))])
    refuse_to_save(
        r"a parameter of shape \(3, 7\) that the model does not have: found it in AdamW", model, stranger, tmp_path
    )
    refuse_to_save("optimizer: found a builtins.dict, expected one of Megatron's", model, {}, tmp_path)
    refuse_to_save("optimizer: found a builtins.list, expected", model, [every], tmp_path)
    spread = ZeroRedundancyOptimizer(list(trainable(model).values()), torch.optim.SGD, lr=1.0)
    refuse_to_save("optimizer: found a .*ZeroRedundancyOptimizer, expected", model, spread, tmp_path)
    hooked = torch.optim.SGD([{"params": list(trainable(model).values()), "hook": print}], lr=1.0)
    refuse_to_save("parameter group 0 of SGD: hook is a builtins.builtin_function", model, hooked, tmp_path)


def refuse_to_load(message: str, path: Path, model: nn.Module, optimizer: Any) -> None:
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        dora_fx.load_checkpoint(model, path, optimizer)
    assert_same(everything(model, optimizer), before)


def test_another_optimizer_than_the_saved_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    source = trained(OPTIMIZERS["adamw"], 1)
    dora_fx.save_checkpoint(source[0], path, source[1])
    model, optimizer = trained(OPTIMIZERS["sgd_momentum"], 1, seed=2)
    refuse_to_load(
        f"{path}: found the state of a torch.optim.adamw.AdamW, expected that of a .*SGD", path, model, optimizer
    )
    model = adapted(seed=2)
    refuse_to_load(
        "found 1 parameter groups, expected the 2 of the optimizer given",
        path,
        model,
        torch.optim.AdamW(groups_of(model)),
    )
    fewer = torch.optim.AdamW(list(trainable(model).values())[1:])
    refuse_to_load("5 unexpected|unexpected; expected the optimizer it was saved with", path, model, fewer)
    dora_fx.save_checkpoint(source[0], path, torch.optim.AdamW(list(trainable(source[0]).values())))
    refuse_to_load(
        r"weight_magnitude \(1 such parameters\): found in parameter group 0 of the saved optimizer alone",
        path,
        model,
        fewer,
    )
    dora_fx.save_checkpoint(source[0], path)
    refuse_to_load("found no optimizer state", path, model, optimizer)
