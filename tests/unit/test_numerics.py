"""Every kind of adapted layer against the float64 oracle: output and all gradients, eager and compiled, in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.closeness import assert_below, assert_close, relative_error
from tests.models import IN, LINEAR_KINDS, OUT, LinearZoo, adapt_zoo, trainable
from tests.oracle import (
    Results,
    expected_zoo_results,
    reference_outputs,
    reference_zoo,
    zoo_loss,
    zoo_results,
)
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
COMPILERS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "dora_fx(eager)": {"backend": "dora_fx", "options": {"inner_compiler": "eager"}},
    "dora_fx(aot_eager)": {"backend": "dora_fx", "options": {"inner_compiler": "aot_eager"}},
    "dora_fx(inductor)": {"backend": "dora_fx"},
}
INDUCTOR = ["inductor", "dora_fx(inductor)"]
PRECISE = [(torch.float64, 0.25), (torch.float32, 0.0)]
OTHERS = [(torch.float64, 0.0), (torch.float32, 0.25)]
# Which layers get two-dimensional inputs. Compiled code meets each pair of a shape, a precision and a dropout once.
EVERY_KIND = [
    (("eager", "all"), PRECISE + OTHERS),
    (("eager", "none"), PRECISE + OTHERS),
    (("dora_fx(eager)", "all"), PRECISE),
    (("dora_fx(eager)", "none"), OTHERS),
    (("dora_fx(aot_eager)", "every other"), PRECISE),
]
# One layer per shape of the base call in a graph; Inductor takes seconds for each.
FEW_KINDS = {0.0: ["column_bias_returned", "row_bias_added", "linear_bias", "output_layer"]}
FEW_KINDS[0.25] = FEW_KINDS[0.0][:2]
RecordError = Callable[[str, str, torch.dtype, float], None]


def compiled(zoo: LinearZoo, compiler: str) -> Callable[..., Results]:
    settings = COMPILERS[compiler]
    return zoo if settings is None else torch.compile(zoo, fullgraph=True, **settings)


def tensors(kinds: list[str], features: int, dtype: torch.dtype, two_dims: str) -> Results:
    """One tensor per kind, 15 tokens each: `[tokens, features]` for all kinds, none, or every other one."""
    flat = {"all": lambda i: True, "none": lambda i: False, "every other": lambda i: i % 2 == 0}[two_dims]
    return {
        kind: torch.randn((15, features) if flat(i) else (5, 3, features), dtype=dtype) for i, kind in enumerate(kinds)
    }


def assert_agrees(zoo: LinearZoo, call: Callable[..., Results], compiler: str, two_dims: str, record: Any) -> None:
    dtype = trainable(zoo)[f"{zoo.kinds[0]}.adapter.linear_in.weight"].dtype
    inputs, targets = (tensors(zoo.kinds, size, dtype, two_dims) for size in (IN, OUT))
    expected = expected_zoo_results(zoo, inputs, targets)
    found = zoo_results(zoo, call, inputs, targets)
    errors = {
        (kind, what): relative_error(found[kind][what], expected[kind][what])
        for kind in zoo.kinds
        for what in expected[kind]
    }
    for (kind, _), error in errors.items():
        record(kind, compiler, dtype, error)
    assert_below({f"{kind}: {what}": error for (kind, what), error in errors.items()}, TOLERANCE[dtype])


def check_in_training(zoo: LinearZoo, compiler: str, two_dims: str, record: RecordError) -> None:
    """Compare before training, and after 1 and 20 steps of AdamW through the same compiled code."""
    call = compiled(zoo, compiler)
    dtype = zoo.embedding.weight.dtype
    inputs, targets = (tensors(zoo.kinds, size, dtype, two_dims) for size in (IN, OUT))
    # Inputs that ask for a gradient as those of the comparison do: the same graph serves both.
    inputs = {kind: x.requires_grad_() for kind, x in inputs.items()}
    optimizer = torch.optim.AdamW(trainable(zoo).values(), lr=0.02)
    for step in range(21):
        if step in (0, 1, 20):
            assert_agrees(zoo, call, compiler, two_dims, record)
        optimizer.zero_grad()
        zoo_loss(call(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("compiler", "two_dims", "dtype", "dropout"), [(*case, *rest) for case, several in EVERY_KIND for rest in several]
)
def test_every_kind(
    compiler: str, two_dims: str, dtype: torch.dtype, dropout: float, record_error: RecordError
) -> None:
    zoo = adapt_zoo(LinearZoo().to(dtype), dropout=dropout)
    check_in_training(zoo, compiler, two_dims, record_error)


@pytest.mark.parametrize(
    ("compiler", "dtype", "dropout"),
    [
        ("inductor", torch.float32, 0.25),
        ("dora_fx(inductor)", torch.float64, 0.25),
        ("dora_fx(inductor)", torch.float32, 0.25),
        ("dora_fx(inductor)", torch.float32, 0.0),
    ],
    ids=str,
)
def test_one_kind_per_shape_of_call(
    compiler: str, dtype: torch.dtype, dropout: float, record_error: RecordError
) -> None:
    zoo = adapt_zoo(LinearZoo(FEW_KINDS[dropout]).to(dtype), dropout=dropout)
    check_in_training(zoo, compiler, "every other", record_error)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("compiler", INDUCTOR)
def test_every_kind_through_inductor(
    compiler: str, dtype: torch.dtype, dropout: float, record_error: RecordError
) -> None:
    zoo = adapt_zoo(LinearZoo().to(dtype), dropout=dropout)
    check_in_training(zoo, compiler, "every other", record_error)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("compiler", ["eager", "dora_fx(aot_eager)"])
def test_training_reaches_the_oracles_parameters(compiler: str, dropout: float) -> None:
    """Both train on their own for 20 steps, drawing the same masks; rounding grows along the way."""
    zoo = adapt_zoo(LinearZoo(FEW_KINDS[0.0]).double(), dropout=dropout)
    call = compiled(zoo, compiler)
    inputs, targets = (tensors(zoo.kinds, size, torch.float64, "every other") for size in (IN, OUT))
    layers = reference_zoo(zoo)
    before = {name: parameter.detach().clone() for name, parameter in trainable(zoo).items()}
    train(lambda: zoo_loss(call(inputs), targets), trainable(zoo))
    train(lambda: zoo_loss(reference_outputs(layers, inputs), targets), dict(layers.named_parameters()))
    for kind in zoo.kinds:
        adapter, layer = getattr(zoo, kind).adapter, layers[kind]
        found = {"A": adapter.linear_in.weight, "B": adapter.linear_out.weight, "m": adapter.weight_magnitude}
        expected = {"A": layer.lora_a, "B": layer.lora_b, "m": layer.magnitude}
        # AdamW divides each gradient by its own size, so an element whose gradient is a hundredth of the others' has
        # an update that is a hundred times as far off as a gradient may be.
        assert_close(found, expected, 100 * TOLERANCE[torch.float64])
    assert all(relative_error(parameter, before[name]) > 1e-3 for name, parameter in trainable(zoo).items())


def train(loss: Callable[[], torch.Tensor], parameters: dict[str, torch.nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02)
    for step in range(20):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss().backward()
        optimizer.step()


@every_case("kind", LINEAR_KINDS)
def test_oracle_is_sensitive(kind: str) -> None:
    """A magnitude that is wrong by one part in a million in one row is an error that the comparison sees."""
    zoo = adapt_zoo(LinearZoo([kind]).double())
    inputs, targets = (tensors([kind], size, torch.float64, "none") for size in (IN, OUT))
    expected = expected_zoo_results(zoo, inputs, targets)
    with torch.no_grad():
        getattr(zoo, kind).adapter.weight_magnitude[0] *= 1 + 1e-6
    found = zoo_results(zoo, zoo, inputs, targets)
    assert all(relative_error(found[kind][what], expected[kind][what]) > 1e-9 for what in expected[kind])
