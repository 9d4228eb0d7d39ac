"""On an H100 a DoRA site takes LoRA's kernels forward, and one to three more backward, by the width of its output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dora_fx.function.formula import adapted_linear
from dora_fx.function.site_parameters import CachedParameters, StoredParameters, complete_parameters

pytest.importorskip("triton", reason="Inductor generates Triton code where Triton is installed")

from tests.graph.triton_source import compile_for_h100, kernel_kinds, kernel_sources, triton_source

TOKENS, IN, DIM = 4096, 1024, 16


def dora(x, weight, lora_a, lora_b, magnitude, delta, grad_gain, grad_scale, scaling):
    """A column site on one rank, from its cache, as the rewritten graph computes it."""
    stored = StoredParameters(
        weight=weight,
        base_norm_sq=None,
        lora_a=lora_a,
        lora_b=lora_b,
        magnitude=magnitude,
        scaling=scaling,
        dropout_threshold=None,
        dropout_rescale=None,
        layout_name="column",
        dtype=weight.dtype,
    )
    [complete] = complete_parameters([stored], [CachedParameters(delta, grad_gain, grad_scale, None, None)])
    return adapted_linear(x, stored, complete, None, dtype=x.dtype)


def lora(x, weight, lora_a, lora_b, *_):
    return F.linear(x, weight) + F.linear(F.linear(x, lora_a) * 2.0, lora_b)


def operands(out_features: int) -> tuple[torch.Tensor, ...]:
    bf16 = {"dtype": torch.bfloat16, "device": "cpu"}
    row = torch.empty(out_features, device="cpu")
    return (
        torch.empty(TOKENS, IN, requires_grad=True, **bf16),
        torch.empty(out_features, IN, **bf16),
        torch.empty(DIM, IN, requires_grad=True, **bf16),
        torch.empty(out_features, DIM, requires_grad=True, **bf16),
        torch.empty_like(row, requires_grad=True),
        torch.empty_like(row),
        torch.empty_like(row),
        torch.empty_like(row),
        torch.empty(1, device="cpu"),
    )


@pytest.mark.parametrize("out_features", [2048, 12288])
def test_forward_takes_the_kernels_of_lora(out_features):
    kinds = [kernel_kinds(triton_source(function, operands(out_features))[0]) for function in (lora, dora)]
    assert kinds == [["pointwise", "pointwise"]] * 2


@pytest.mark.parametrize(
    ("out_features", "added"),
    # The magnitude's gradient is a sum over all tokens: one kernel where there are rows enough to fill the device,
    # and it also scales the gradient of the output; else partial sums, their sum, and the scaling.
    [(12288, ["reduction"]), (2048, ["reduction", "persistent reduction", "pointwise"])],
)
def test_backward_adds_the_magnitudes_gradient(out_features, added):
    kinds = [sorted(kernel_kinds(triton_source(function, operands(out_features))[1])) for function in (lora, dora)]
    assert kinds == [["pointwise", "pointwise"], sorted([*added, "pointwise", "pointwise"])]


def test_kernels_compile_for_sm_90_without_spilling(tmp_path):
    sources = [source for code in triton_source(dora, operands(12288)) for source in kernel_sources(code).items()]
    compiled = [compile_for_h100(name, source, tmp_path) for name, source in sources]
    print(*compiled, sep="\n")
    assert len(compiled) == 5
    assert [kernel.spilled_bytes for kernel in compiled] == [0] * 5
