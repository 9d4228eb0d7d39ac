"""Attaching tries each layer with a few rows: one that computes something else than its kind says is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import nn

import dora_fx
from dora_fx.modules import kinds
from dora_fx.modules.kinds.megatron_linear import ColumnParallel
from dora_fx.modules.kinds.torch_linear import TorchLinear
from tests.closeness import assert_close, rounding
from tests.models import DIM, IN, OUT, LinearZoo, column, config, row, sites
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")


class ScaledLinear(nn.Linear):
    def __init__(self, scale: float) -> None:
        super().__init__(IN, OUT)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Scaled(TorchLinear):
    class_module, class_name = __name__, ScaledLinear.__name__


class ResidualColumnLinear(ColumnParallelLinear):
    def forward(self, input_: torch.Tensor, *args: Any) -> Any:
        output, bias = super().forward(input_, *args)
        return output + 0.5, bias


class Residual(ColumnParallel):
    class_module, class_name = __name__, ResidualColumnLinear.__name__


class CountingLinear(nn.Linear):
    """Counts its calls and draws numbers, as no layer that is tried should be seen to."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.calls, self.log = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(torch.rand(3))
        self.seen += 1
        return super().forward(x)


class Counting(TorchLinear):
    class_module, class_name = __name__, CountingLinear.__name__


class Biasless(TorchLinear):
    """Forgets that nn.Linear adds its bias."""

    @staticmethod
    def added_bias(linear: Any) -> None:
        return None


class WrongBias(TorchLinear):
    """Names a bias of another size."""

    @staticmethod
    def added_bias(linear: Any) -> torch.Tensor:
        return torch.zeros(OUT + 1)


@pytest.fixture
def more_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", (Scaled, Residual, Counting, *kinds.KINDS))


def with_forward(linear: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    forward = linear.forward
    linear.forward = lambda *args, **kwargs: change(forward(*args, **kwargs))
    return linear


def one_wrong_row(linear: nn.Module) -> nn.Module:
    def change(output: torch.Tensor) -> torch.Tensor:
        return torch.cat((output[..., :1] * 1.5, output[..., 1:]), -1)

    return with_forward(linear, change)


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "new_kind": (lambda: ScaledLinear(0.7), "found a ScaledLinear whose outputs are off W0 x + bias by up to 3.0e-01"),
    "subclass": (
        lambda: ResidualColumnLinear(IN, OUT, config=config(), init_method=nn.init.normal_, bias=False),
        "found a ResidualColumnLinear whose outputs are off",
    ),
    "replaced_forward": (
        lambda: with_forward(row(bias=True), lambda returned: (2 * returned[0], returned[1])),
        "found a RowParallelLinear whose outputs are off W0 x + bias by up to 1.0e+00",
    ),
    "bias_returned": (
        lambda: with_forward(column(bias=True, skip_bias_add=True), lambda returned: (sum(returned), None)),
        "found a ColumnParallelLinear that returns [(1, 8, 40), None], expected [(1, 8, 40), (40,)]",
    ),
    "tuple": (
        lambda: with_forward(nn.Linear(IN, OUT), lambda output: (output,)),
        "found a Linear that returns [(1, 8, 40)], expected [(1, 8, 40)] as its kind describes it",
    ),
    "another_size": (
        lambda: with_forward(nn.Linear(IN, OUT), lambda output: output[..., 1:]),
        "found a Linear that returns [(1, 8, 39)], expected [(1, 8, 40)]",
    ),
    "bfloat16": (lambda: one_wrong_row(nn.Linear(IN, OUT)).bfloat16(), "off W0 x + bias by up to 5.0e-01"),
    "float16": (lambda: one_wrong_row(nn.Linear(IN, OUT)).half(), "off W0 x + bias by up to 5.0e-01"),
    "float64": (
        lambda: with_forward(nn.Linear(IN, OUT), lambda output: output * (1 + 1e-9)).double(),
        "off W0 x + bias by up to 1.0e-09",
    ),
}


@every_case("name", WRONG)
def test_another_function_is_refused_before_anything_changes(name: str, more_kinds: None) -> None:
    build, text = WRONG[name]
    model = nn.ModuleDict({"right": nn.Linear(IN, OUT), "wrong": build()})
    before = list(model.modules())
    with pytest.raises(ValueError) as raised:
        dora_fx.DoRA(["right", "wrong"], dim=DIM)(model)
    assert str(raised.value).startswith("wrong: ") and text in str(raised.value)
    assert list(model.modules()) == before and all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Biasless, "found a Linear whose outputs are off"),
        (WrongBias, "found a Linear that runs and cannot be computed"),
    ],
)
def test_a_kind_that_is_wrong_about_the_bias_is_refused(
    kind: type[TorchLinear], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "KINDS", (kind,))
    with pytest.raises(ValueError, match=f"^wrong: {text}"):
        dora_fx.DoRA(["wrong"], dim=DIM)(nn.ModuleDict({"wrong": nn.Linear(IN, OUT)}))


def test_a_new_kind_calls_its_layers(more_kinds: None) -> None:
    """What such a layer computes later is in the adapted one too, eager and compiled."""
    model = nn.ModuleDict({"linear": ScaledLinear(1.0)})
    dora_fx.DoRA(["linear"], dim=DIM)(model)
    site, x = sites(model)["linear"], torch.randn(5, IN)
    site.to_wrap.scale.fill_(0.7)
    assert torch.equal(site(x), site.to_wrap(x))
    compiled = torch.compile(site, backend="dora_fx", options={"inner_compiler": "eager"})
    assert_close(compiled(x), site(x), rounding(torch.float32, 2 * IN))


def test_trying_leaves_no_trace(more_kinds: None) -> None:
    model = nn.ModuleDict({"linear": CountingLinear(), "hooked": nn.Linear(IN, OUT)})
    called = []
    model["hooked"].register_forward_hook(lambda module, args, output: called.append(1) or 2 * output)
    x, state = torch.randn(3, IN), torch.get_rng_state()
    before = model["hooked"](x)
    dora_fx.DoRA(["linear", "hooked"], dim=DIM)(model)
    base = model["linear"].to_wrap
    assert (base.calls, base.log, float(base.seen), called) == (0, [], 0.0, [1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model["hooked"](x), before), "a hook's change of the output is the user's"


def test_a_layer_that_cannot_be_called_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("this layer needs its device")

    zoo = LinearZoo(["linear", "linear_bias"])
    zoo.linear.forward = zoo.linear_bias.forward = fail
    with caplog.at_level(logging.WARNING, "dora_fx"):
        dora_fx.DoRA(zoo.kinds, dim=DIM)(zoo)
    [message] = [record.getMessage() for record in caplog.records if "cannot be called" in record.getMessage()]
    assert message.startswith("Linear: cannot be called") and "this layer needs its device" in message
    assert list(sites(zoo)) == zoo.kinds
