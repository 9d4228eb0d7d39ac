"""Layers over Transformer Engine, with emulated kernels, that cannot be adapted: one clear error, nothing changed."""

from __future__ import annotations

import copy
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import dora_fx
from dora_fx.modules import kinds
from dora_fx.modules.kinds.transformer_engine import TELayerNormColumnParallel
from tests.distributed.launch import run_ranks
from tests.distributed.zoo import HIDDEN, Topology, make_config
from tests.te_layers import SINGLE_LAYERS, adapt, layer_and_input, output_of

pytestmark = pytest.mark.usefixtures("emulated_te")


def refusals(build: Callable[[], nn.Module]) -> tuple[str, str, bool]:
    """Class and text of the error when a model is adapted, and whether everything is as it was."""
    model = build()
    before, state = list(model.modules()), {key: id(value) for key, value in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    try:
        dora_fx.DoRA(["*linear*"], dim=4)(model)
    except (ValueError, TypeError) as error:
        unchanged = before == list(model.modules()) and state == {k: id(v) for k, v in model.named_parameters()}
        unchanged &= flags == [parameter.requires_grad for parameter in model.parameters()]
        return type(error).__name__, str(error), unchanged
    raise AssertionError("nothing was refused")


def with_attribute(name: str, value: Any, of: str = "") -> nn.Module:
    """A column layer of which, or of a part of which, an attribute is another one; its configuration is its own."""
    model, _ = layer_and_input("te_norm_column_rms")
    model["linear"].config = copy.copy(model["linear"].config)
    setattr(model["linear"].get_parameter(of) if of == "weight" else _part(model, of), name, value)
    model["plain"] = nn.Linear(4, 4)
    return model


def _part(model: nn.Module, of: str) -> Any:
    return getattr(model["linear"], of) if of else model["linear"]  # type: ignore[index]


def fp8_config() -> nn.Module:
    return with_attribute("fp8", "hybrid", of="config")


def fp4_config() -> nn.Module:
    return with_attribute("fp4", "e2m1", of="config")


def own_recipe() -> nn.Module:
    from megatron.core.extensions.transformer_engine import TEQuantizationParams, TEQuantizationRecipe

    return with_attribute("te_quant_params", TEQuantizationParams(TEQuantizationRecipe(), None))


def quantised_weight() -> nn.Module:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    model, _ = layer_and_input("te_column")
    shape = model["linear"].weight.shape
    from transformer_engine.pytorch.constants import DType

    weight = Float8Tensor(
        shape=shape,
        dtype=torch.float32,
        data=torch.zeros(shape, dtype=torch.uint8),
        fp8_scale_inv=torch.ones(1),
        fp8_dtype=DType.kFloat8E4M3,
        device="cpu",
    )
    model["linear"].weight = nn.Parameter(weight, requires_grad=False)
    return model


def op_fused_mlp() -> nn.Module:
    from megatron.core.extensions.transformer_engine import (
        TEFusedMLP,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )
    from megatron.core.transformer.mlp import MLPSubmodules

    submodules = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return nn.ModuleDict({"mlp": TEFusedMLP(make_config(Topology(), torch.float32), submodules)})


def no_communication_of_an_expert() -> nn.Module:
    """On one rank an expert's layer is as any other."""
    model = no_communication()
    return nn.ModuleDict({"experts": nn.ModuleDict({"local_experts": nn.ModuleList([model])})})


def no_communication() -> nn.Module:
    """As overlapped shared experts have it: sizes divided beforehand, communication left to others."""
    return with_attribute("parallel_mode", None)


def other_number_of_ranks() -> nn.Module:
    return with_attribute("tp_size", 2)


def sequence_parallel_on_one_rank() -> nn.Module:
    return with_attribute("sequence_parallel", True)


def duplicated_sequence_parallel_on_one_rank() -> nn.Module:
    model, _ = layer_and_input("te_duplicated")
    model["linear"].config = copy.copy(model["linear"].config)
    model["linear"].config.sequence_parallel = True
    return model


def no_group() -> nn.Module:
    return with_attribute("_tp_group", None)


def subclass() -> nn.Module:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    model, _ = layer_and_input("te_column")
    model["linear"].__class__ = type("TELMHeadColumnParallelLinear", (TEColumnParallelLinear,), {})
    return model


def hooked() -> nn.Module:
    model, _ = layer_and_input("te_column")
    model["linear"].register_forward_hook(lambda *_: None)
    return model


REFUSED: dict[Callable[[], nn.Module], tuple[str, str]] = {
    fp8_config: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear whose configuration has fp8 = 'hybrid'",
    ),
    fp4_config: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear whose configuration has fp4 = 'e2m1'",
    ),
    own_recipe: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear with quantisation parameters of its own",
    ),
    quantised_weight: ("ValueError", "linear.weight: found a Float8Tensor, expected a plain parameter"),
    op_fused_mlp: (
        "TypeError",
        "mlp.linear_fc1: found a layer of a TEFusedMLP, which computes with its parameters and",
    ),
    no_communication_of_an_expert: (
        "ValueError",
        "experts.local_experts.0.linear: found a TELayerNormColumnParallelLinear with parallel_mode = None, expected",
    ),
    no_communication: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear with parallel_mode = None, expected",
    ),
    other_number_of_ranks: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear that was built for 2 tensor-",
    ),
    sequence_parallel_on_one_rank: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear with sequence parallelism on one tensor-parallel rank, ex",
    ),
    duplicated_sequence_parallel_on_one_rank: (
        "ValueError",
        "linear: found a TELinear with sequence parallelism on one tensor-parallel rank, expected several ranks or",
    ),
    no_group: (
        "ValueError",
        "linear: found a TELayerNormColumnParallelLinear without a tensor-parallel group, expected",
    ),
    subclass: ("TypeError", "TELMHeadColumnParallelLinear has no DoRA layout; supported are ColumnParallelLinear,"),
    hooked: ("ValueError", "linear: found a TEColumnParallelLinear with hooks or a forward of its own, expected none"),
}


def all_refusals() -> dict[str, tuple[str, str, bool]]:
    return {build.__name__: refusals(build) for build in REFUSED}


def test_refused_before_anything_changes_emulated_kernels():
    found = run_ranks(all_refusals, 1, 1)
    for build, (kind, text) in REFUSED.items():
        error, message, unchanged = found[build.__name__]
        assert (error, text in message, unchanged) == (kind, True, True), f"{build.__name__}: {error}: {message}"


def generalised_tensor_parallelism() -> tuple[str, str, bool]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.gtp_api import attach_gtp_to_presharded_module

    def build() -> nn.Module:
        model, _ = layer_and_input("te_column", topology=Topology(tp=2))
        group = parallel_state.get_tensor_model_parallel_group()
        attach_gtp_to_presharded_module(model["linear"], group, 0)
        return model

    return refusals(build)


def has_gtp() -> bool:
    try:
        from megatron.core.tensor_parallel import gtp_api  # noqa: F401
    except ImportError:
        return False
    return True


def test_generalised_tensor_parallelism_emulated_kernels():
    if not has_gtp():
        pytest.skip("this megatron-core has no generalised tensor parallelism")
    kind, message, unchanged = run_ranks(generalised_tensor_parallelism, 2, 2)
    assert kind == "ValueError" and unchanged
    assert message.startswith(
        "linear.weight: found a shard of generalised tensor parallelism (GTP) over 2 ranks, expec"
    )


def a_kind_without_its_norm() -> tuple[str, str, bool]:
    class Forgetful(TELayerNormColumnParallel):
        @staticmethod
        def input_norm(linear: Any) -> None:
            return None

    with mock.patch.object(kinds, "KINDS", (Forgetful,)):
        return refusals(lambda: layer_and_input("te_norm_column_rms")[0])


def test_a_kind_that_forgets_the_norm_is_refused_emulated_kernels():
    kind, message, unchanged = run_ranks(a_kind_without_its_norm, 1, 1)
    assert kind == "ValueError" and unchanged
    assert message.startswith("linear: found a TELayerNormColumnParallelLinear whose outputs are off W0 x + bias by")


@contextmanager
def fp8_autocast() -> Iterator[None]:
    """Transformer Engine's own state within its autocast, which a machine without FP8 does not let in."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    with mock.patch.object(FP8GlobalStateManager.quantization_state, "fp8_enabled", True):
        assert FP8GlobalStateManager.is_fp8_enabled()
        yield


def calls_in_another_state() -> None:
    for name in SINGLE_LAYERS[:1] + SINGLE_LAYERS[-1:]:
        model, x = layer_and_input(name)
        site = adapt(model)
        plain = output_of(model, x)
        called = torch.compile(lambda x, model=model: output_of(model, x), backend="dora_fx")
        for call in (lambda x, model=model: output_of(model, x), called):
            with (
                torch.autocast("cpu", torch.bfloat16),
                pytest.raises((ValueError, RuntimeError), match=r"linear: found torch\.autocast around a TEL"),
            ):
                call(x)
            handle = site.to_wrap.register_forward_pre_hook(lambda *_: None)
            with pytest.raises(
                (ValueError, RuntimeError), match=r"linear: found a TEL.* with hooks or a forward of its"
            ):
                call(x)
            handle.remove()
            with (
                fp8_autocast(),
                pytest.raises((ValueError, RuntimeError), match="linear: found Transformer Engine's FP8"),
            ):
                call(x)
            torch.testing.assert_close(call(x), plain, rtol=1e-5, atol=1e-6)
        with pytest.raises(
            ValueError, match=rf"^linear: the input has {HIDDEN + 1} features, the layer takes {HIDDEN}"
        ):
            site(torch.zeros(2, HIDDEN + 1))
        with pytest.raises(TypeError):
            site(x, site.weight)


def test_calls_in_a_state_that_the_layer_would_heed_emulated_kernels():
    run_ranks(calls_in_another_state, 1, 1)


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def enters_fp8_after_compiled_calls() -> None:
    """With any compiler, and whatever is computed once per step."""
    compilers: dict[str, dict[str, Any]] = {
        "dora_fx": {"inner_compiler": "eager"},
        "every call": {"inner_compiler": "eager", "weight_norm": "every_call"},
        "aot_eager": {},
    }
    for name, options in compilers.items():
        torch._dynamo.reset()
        model, x = layer_and_input("te_norm_column_rms")
        adapt(model)
        backend = name if name == "aot_eager" else "dora_fx"
        called = torch.compile(lambda x, model=model: output_of(model, x), backend=backend, options=options or None)
        plain, graphs = called(x), num_graphs()
        # What is imported in between is no reason to trace anew.
        sys.modules[f"imported after {name}"] = types.ModuleType("imported")
        assert torch.equal(called(x), plain) and num_graphs() == graphs
        with fp8_autocast(), pytest.raises(ValueError, match=r"^linear: found Transformer Engine's FP8 autocast"):
            called(x)
        torch.testing.assert_close(called(x), plain, rtol=1e-5, atol=1e-6)


def test_fp8_is_noticed_after_a_compiled_call_emulated_kernels():
    run_ranks(enters_fp8_after_compiled_calls, 1, 1)


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def warnings_of_transports() -> list[str]:
    handler = Records()
    logging.getLogger("dora_fx").addHandler(handler)
    for option, value in (("tp_comm_overlap", True), ("symmetric_ar_type", "two_shot"), ("tp_comm_overlap", True)):
        dora_fx.DoRA(["linear"], dim=4)(with_attribute(option, value, of="config"))
    return [message for message in handler.messages if "Transformer Engine" in message]


def test_other_transports_warn_once_emulated_kernels():
    overlap, symmetric = run_ranks(warnings_of_transports, 1, 1)
    assert overlap.startswith(
        "tp_comm_overlap: adapted Transformer Engine layers compute the same without communication"
    )
    assert symmetric.startswith(
        "symmetric_ar_type: adapted Transformer Engine layers compute the same without reduction"
    )
