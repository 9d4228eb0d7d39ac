"""Layers over Transformer Engine, with emulated kernels: against its own forward, and through their life."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import dora_fx
from dora_fx.modules.kinds import describe_linear
from tests.closeness import assert_below, assert_close, relative_error, rounding
from tests.distributed.launch import run_ranks
from tests.distributed.zoo import FFN, HIDDEN, Topology, set_adapter_values
from tests.te_layers import SINGLE_LAYERS, adapt, layer_and_input, output_of

pytestmark = pytest.mark.usefixtures("emulated_te")

Errors = dict[str, float]


@contextmanager
def counted_kernels() -> Iterator[list[str]]:
    """The names of Transformer Engine's products that run within the context."""
    import transformer_engine_torch as compiled_module

    ran: list[str] = []
    original = compiled_module.generic_gemm

    def counting(*args: Any, **kwargs: Any) -> Any:
        ran.append("generic_gemm")
        return original(*args, **kwargs)

    with mock.patch.object(compiled_module, "generic_gemm", counting):
        yield ran


def fresh_adapter_errors(dtype: torch.dtype) -> Errors:
    """A fresh adapter's output and input gradient against the layer's own forward and backward, by layer."""
    errors = {}
    for name in SINGLE_LAYERS:
        model, x = layer_and_input(name, dtype)
        results = []
        for _ in ("base", "adapted"):
            output = output_of(model, x)
            weights = torch.ones_like(output).cumsum(0)
            [dx] = torch.autograd.grad((output * weights).sum(), x)
            results.append((output, dx))
            adapt(model, trained=False)
        [(y, dx), (adapted_y, adapted_dx)] = results
        errors[f"{name} y"], errors[f"{name} dx"] = relative_error(adapted_y, y), relative_error(adapted_dx, dx)
    return errors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_a_fresh_adapter_is_the_layer_itself_emulated_kernels(dtype, bound):
    errors = run_ranks(fresh_adapter_errors, 1, 1, dtype)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert_below(errors, bound)


def onnx_errors() -> Errors:
    """A fresh adapter's output against Transformer Engine's own forward for ONNX, which is plain torch."""
    from transformer_engine.pytorch.export import onnx_export

    errors = {}
    for name in SINGLE_LAYERS:
        model, x = layer_and_input(name)
        with torch.no_grad():
            output_of(model, x)
            with onnx_export(enabled=True):
                expected = output_of(model, x)
            adapt(model, trained=False)
            errors[name] = relative_error(output_of(model, x), expected)
    return errors


def test_a_fresh_adapter_is_the_forward_for_onnx_emulated_kernels():
    errors = run_ranks(onnx_errors, 1, 1)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert_below(errors, 2e-6)


def kernels_of_a_call() -> dict[str, list[int]]:
    """How many of Transformer Engine's products run forward and backward: adapted, in evaluation, disabled, merged."""
    counts: dict[str, list[int]] = {}
    for name in SINGLE_LAYERS:
        model, x = layer_and_input(name)
        base = output_of(model, x)
        site = adapt(model)
        counts[name] = []

        def run(model: Any = model, x: torch.Tensor = x, name: str = name) -> torch.Tensor:
            with counted_kernels() as ran:
                output = output_of(model, x)
                output.sum().backward()
            counts[name].append(len(ran))
            return output

        run()
        model.eval()
        run()
        site.disable_adapter_layers()
        assert torch.equal(run(), base)
        site.enable_adapter_layers()
        dora_fx.merge(model)
        run()
    return counts


def test_transformer_engine_runs_when_the_adapter_is_off_emulated_kernels():
    counts = run_ranks(kernels_of_a_call, 1, 1)
    # Merged and disabled: the product, and that of its backward pass.
    assert counts == {name: [0, 0, 2, 2] for name in SINGLE_LAYERS}


def merged_errors() -> Errors:
    errors = {}
    for name in SINGLE_LAYERS:
        model, x = layer_and_input(name)
        site = adapt(model)
        layer, before = site.to_wrap, {key: value.clone() for key, value in site.to_wrap.named_parameters()}
        adapted = output_of(model, x)
        dora_fx.merge(model, keep_adapter=True)
        assert model["linear"] is layer
        after = dict(layer.named_parameters())
        # The merged weight acts on the normalised input.
        assert [key for key in before if not torch.equal(before[key], after[key])] == ["weight"]
        errors[name] = relative_error(output_of(model, x), adapted)
        dora_fx.unmerge(model)
        assert model["linear"] is site
        assert all(torch.equal(value, dict(layer.named_parameters())[key]) for key, value in before.items())
        assert torch.equal(output_of(model, x), adapted)
    return errors


def test_merged_layers_emulated_kernels():
    # Sums over the features of the input, and the norm's before them.
    assert_below(run_ranks(merged_errors, 1, 1), rounding(torch.float32, HIDDEN + FFN))


def state_of_layers() -> None:
    for name in SINGLE_LAYERS:
        model, x = layer_and_input(name)
        plain = model.state_dict()
        sharded = model["linear"].sharded_state_dict("linear.", (), _metadata())
        adapt(model)
        adapted, output = model.state_dict(), output_of(model, x)
        own = {key for key in adapted if ".adapter." not in key}
        assert own == set(plain), name
        assert "linear._extra_state" in own and ("linear.layer_norm_weight" in own) == ("norm" in name)
        both = model["linear"].sharded_state_dict("linear.", (), _metadata())
        assert {key for key in both if ".adapter." not in key} == set(sharded), name
        assert sum(".adapter." in key for key in both) == 3
        other, _ = layer_and_input(name)
        site = adapt(other, trained=False)
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(adapted)
        assert torch.equal(output_of(other, x), output), name
        # Without an adapter, as Megatron loads a base.
        missing = other.load_state_dict(plain, strict=False)
        assert all(".adapter." in key for key in missing.missing_keys) and not missing.unexpected_keys
        assert site.base_weight is site.to_wrap.weight


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def test_state_dicts_keep_their_keys_emulated_kernels():
    run_ranks(state_of_layers, 1, 1)


READ_THROUGH = ("layer_norm_weight", "layer_norm_bias", "eps", "normalization", "zero_centered_gamma", "use_bias")
READ_THROUGH += ("te_return_bias", "_tp_group", "tp_size", "parallel_mode", "sequence_parallel", "config")
READ_THROUGH += ("in_features", "out_features", "is_first_microbatch", "weight", "bias", "te_quant_params")


def attributes_of_layers() -> None:
    from megatron.core.extensions.transformer_engine import split_te_layernorm_column_parallel_linear
    from torch import nn

    for name in SINGLE_LAYERS:
        model, x = layer_and_input(name)
        site = adapt(model)
        base = site.to_wrap
        for attribute in READ_THROUGH:
            assert hasattr(site, attribute) == hasattr(base, attribute), attribute
            assert getattr(site, attribute, None) is getattr(base, attribute, None), attribute
        base.is_first_microbatch = False
        for module in model.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True
        assert base.is_first_microbatch and "is_first_microbatch" not in vars(site)
        with pytest.raises(ValueError, match=r"^linear: found parallel_mode = 'other' set on an adapted layer"):
            site.parallel_mode = "other"
        site.backward_dw()
        if "norm" in name:
            with pytest.raises(ValueError, match=r"^linear: found an adapted layer where another one is built of"):
                split_te_layernorm_column_parallel_linear(site, base.config)
            before = output_of(model, x)
            site.layer_norm_weight = nn.Parameter(2 * site.layer_norm_weight.detach(), requires_grad=False)
            assert base.layer_norm_weight is site.layer_norm_weight
            assert [key for key, _ in site.named_parameters() if key.endswith("layer_norm_weight")] == [
                "to_wrap.layer_norm_weight"
            ]
            assert not torch.allclose(output_of(model, x), before)


def test_attributes_stay_reachable_emulated_kernels():
    run_ranks(attributes_of_layers, 1, 1)


def described_layers() -> dict[str, tuple[Any, ...]]:
    found = {}
    for name in SINGLE_LAYERS:
        linear = layer_and_input(name)[0]["linear"]
        spec = describe_linear("decoder.layers.0.linear", linear)
        norm = None if spec.input_norm is None else spec.input_norm.name
        found[name] = (spec.layout.name, spec.in_features, spec.out_features, norm, spec.bias is not None)
    return found


def test_descriptions_emulated_kernels():
    found = run_ranks(described_layers, 1, 1)
    assert found["te_norm_column_rms"] == ("column", HIDDEN, FFN, "RMSNorm", False)
    assert found["te_norm_column_layer"] == ("column", HIDDEN, FFN, "LayerNorm", True)
    assert found["te_column"] == ("column", HIDDEN, FFN, None, False)
    assert found["te_row_bias_returned"] == ("row", FFN, HIDDEN, None, True)
    assert found["te_duplicated"] == ("replicated", HIDDEN, FFN, None, False)


def whole_sizes(topology: Topology) -> None:
    for name, (layout, tp_group) in {
        "te_norm_column_rms": ("column", True),
        "te_row": ("row", True),
        "te_duplicated": ("replicated", True),
    }.items():
        model, _ = layer_and_input(name, topology=topology)
        spec = describe_linear("linear", model["linear"])
        in_out = (FFN, HIDDEN) if layout == "row" else (HIDDEN, FFN)
        assert (spec.in_features, spec.out_features) == in_out
        assert spec.layout.name == layout + "_sequence_parallel" * topology.sequence_parallel
        assert bool(spec.tp_group_name) == tp_group
    set_adapter_values(model, topology)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sizes_are_those_of_the_whole_layer_emulated_kernels(sequence_parallel):
    run_ranks(whole_sizes, 2, 2, Topology(tp=2, sequence_parallel=sequence_parallel))


def cast_and_frozen_norm() -> None:
    model, x = layer_and_input("te_norm_column_rms")
    site = adapt(model)
    model.bfloat16()
    assert site.adapter.weight_magnitude.dtype is torch.float32
    y = output_of(model, x.detach().bfloat16())
    assert y.dtype is torch.bfloat16
    model.float()
    assert_close(output_of(model, x), y.float(), 2e-2)


def test_a_cast_keeps_the_magnitude_emulated_kernels():
    run_ranks(cast_and_frozen_norm, 1, 1)
