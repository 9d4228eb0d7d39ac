"""A freshly attached adapter changes no bit of the output, and a row of zeros no sense of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from tests.closeness import assert_close
from tests.models import (
    DIM,
    GPT_TARGETS,
    IN,
    LINEAR_KINDS,
    LinearZoo,
    adapt_zoo,
    logits_of,
    tiny_gpt,
    token_ids,
    trainable,
)
from tests.oracle import expected_zoo_results, zoo_results
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

MEGATRON_DEFAULTS: dict[str, Any] = dict(
    normalization="LayerNorm", gated_linear_unit=False, activation_func=torch.nn.functional.gelu, add_bias_linear=True
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qkv_bias": dict(add_qkv_bias=True),
    "gpt": MEGATRON_DEFAULTS,
}


def gpt_of(architecture: str, dtype: torch.dtype) -> nn.Module:
    """A GPT whose biases are not zero; output layer tied in one architecture."""
    model = tiny_gpt(tied=architecture == "gpt", num_layers=1, **ARCHITECTURES[architecture])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype)


# Inductor leaves out the rounding between the operations that it fuses, and takes another cosine in a loop that it
# vectorises. What it fuses around an adapted layer is not what it fuses around the base layer, so without these
# options the neighbours' rounding differs in the last bit, not the layers'.
SAME_NEIGHBOURS = {"emulate_precision_casts": True, "cpp.simdlen": 1}


def compiled_logits(model: nn.Module, options: dict[str, Any], grad: bool) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        call = torch.compile(model, backend="dora_fx", options=options, fullgraph=True)
        return logits_of(call, token_ids()).detach()


def assert_attaching_changes_no_logit(architecture: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = gpt_of(architecture, dtype)
    base = compiled_logits(model.eval().requires_grad_(False), options, grad=False)
    dora_fx.DoRA([*GPT_TARGETS, "output_layer"], dim=DIM)(model)
    assert torch.equal(compiled_logits(model.train(), options, grad=True), base)
    assert torch.equal(compiled_logits(model.eval(), options, grad=False), base)


# What Inductor compiles from the same graphs below is not traced once more.
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gpt", torch.float32),
        ("qkv_bias", torch.float32),
        ("qkv_bias", torch.bfloat16),
    ],
    ids=str,
)
def test_traced_gpt_is_bitwise_the_traced_base(architecture: str, dtype: torch.dtype) -> None:
    assert_attaching_changes_no_logit(architecture, dtype, {"inner_compiler": "aot_eager"})


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt", torch.bfloat16),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("gpt", torch.float32, marks=pytest.mark.slow),
        pytest.param("qkv_bias", torch.float32, marks=pytest.mark.slow),
        pytest.param("qkv_bias", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_gpt_is_bitwise_the_compiled_base(architecture: str, dtype: torch.dtype) -> None:
    assert_attaching_changes_no_logit(architecture, dtype, SAME_NEIGHBOURS)


@pytest.mark.parametrize(
    ("dtype", "shape", "grad"),
    [
        (torch.float32, (15, IN), True),
        (torch.bfloat16, (5, 3, IN), True),
        (torch.bfloat16, (15, IN), False),
    ],
    ids=str,
)
def test_compiled_layers_are_bitwise_the_compiled_base(dtype: torch.dtype, shape: tuple[int, ...], grad: bool) -> None:
    zoo = LinearZoo().to(dtype).requires_grad_(False)
    # A bias that the caller adds is the caller's rounding: Inductor makes it a part of the base's GEMM.
    zoo.adds_returned_bias = False
    inputs = {kind: torch.randn(shape, dtype=dtype) for kind in zoo.kinds}
    base = torch.compile(zoo, backend="dora_fx", fullgraph=True)(inputs)
    dora_fx.DoRA(zoo.kinds, dim=DIM)(zoo)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        found = torch.compile(zoo, backend="dora_fx", fullgraph=True)(inputs)
    assert [kind for kind in zoo.kinds if not torch.equal(found[kind], base[kind])] == []


@every_case("kind", LINEAR_KINDS)
def test_eager_layers_are_bitwise_the_eager_base(kind: str) -> None:
    """Dropout takes nothing from the base product as long as g is one."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for dtype, dropout in itertools.product(dtypes, (0.0, 0.25)):
        zoo = LinearZoo([kind]).to(dtype)
        inputs = {kind: torch.randn(5, 3, IN, dtype=dtype)}
        with torch.no_grad():
            base = zoo(inputs)
        dora_fx.DoRA(zoo.kinds, dim=DIM, dropout=dropout)(zoo)
        assert torch.equal(zoo(inputs)[kind], base[kind]), f"{dtype}, dropout {dropout}"


def zoo_with_zero_rows() -> LinearZoo:
    """Rows 0 and 3 of every W0 are zero, and row 0 of every B."""
    zoo = LinearZoo().double()
    with torch.no_grad():
        for name, parameter in zoo.named_parameters():
            if name.endswith("weight"):
                parameter[[0, 3]] = 0.0
    adapt_zoo(zoo)
    with torch.no_grad():
        for kind in zoo.kinds:
            getattr(zoo, kind).adapter.linear_out.weight[0] = 0.0
    return zoo


@pytest.mark.parametrize("inner_compiler", [None, "aot_eager"])
def test_zero_rows_agree_with_the_oracle(inner_compiler: str | None) -> None:
    zoo = zoo_with_zero_rows()
    inputs = {kind: torch.randn(5, 3, IN, dtype=torch.float64) for kind in zoo.kinds}
    targets = {kind: torch.randn_like(output) for kind, output in zoo(inputs).items()}
    call: Any = zoo
    if inner_compiler is not None:
        call = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": inner_compiler}, fullgraph=True)
    found, expected = zoo_results(zoo, call, inputs, targets), expected_zoo_results(zoo, inputs, targets)
    for kind in zoo.kinds:
        assert_close(found[kind], expected[kind], 1e-12)


@every_case("dropout", [0.0, 0.25])
@every_case("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_zeros_trains_without_nan(dtype: torch.dtype, dropout: float) -> None:
    """g is one, so such a layer learns as LoRA does until its rows have a norm."""
    zoo = LinearZoo().to(dtype)
    with torch.no_grad():
        for parameter in zoo.parameters():
            parameter.zero_()
    dora_fx.DoRA(zoo.kinds, dim=DIM, dropout=dropout)(zoo)
    inputs = {kind: torch.randn(5, 3, IN, dtype=dtype) for kind in zoo.kinds}
    optimizer = torch.optim.AdamW(trainable(zoo).values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = zoo(inputs)
        torch.stack([(output - 1.0).square().mean() for output in outputs.values()]).sum().backward()
        assert all(torch.isfinite(output).all() for output in outputs.values())
        assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(zoo).values())
        optimizer.step()
    assert all(getattr(zoo, kind).adapter.linear_out.weight.abs().sum() > 0 for kind in zoo.kinds)
