"""Golden text of rewritten graphs on one rank. `EXPECTTEST_ACCEPT=1 python -m pytest tests/graph` accepts new text."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

from tests.graph.capture import capture
from tests.graph.sites import IN, adapted, column, row
from tests.recording_backend import graph_text


@pytest.fixture(autouse=True)
def one_rank(tensor_parallel):
    tensor_parallel(1)


def test_column_before():
    assert_expected_inline(
        graph_text(capture(adapted(column()), IN, grad=False).before[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[6, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        t: "f32[48, 80]" = weight.t()
        output: "f32[6, 2, 80]" = torch.matmul(x, t)

        output_1: "f32[6, 2, 80]" = dora_fx_modules_marker_dora_linear(base_output = output, x = x, weight = weight, base_norm_sq = base_norm_sq, lora_a = lora_a, lora_b = lora_b, magnitude = magnitude, scaling = scaling, layout_name = 'column', dtype = torch.float32, cached_delta = delta, cached_grad_gain = grad_gain, cached_grad_scale = grad_scale)
        return (output_1,)
""",
    )


def test_column():
    assert_expected_inline(
        graph_text(capture(adapted(column()), IN).after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[6, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        linear: "f32[6, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[6, 2, 16]" = linear * view
        linear_1: "f32[6, 2, 80]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[6, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[6, 2, 80]" = linear_2 + linear_1
        to: "f32[6, 2, 80]" = add.to(torch.float32)
        scale_rows: "f32[6, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_column_with_bias():
    backend = capture(adapted(column(bias=True, skip_bias_add=False)), IN)
    assert_expected_inline(
        graph_text(backend.after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[6, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", bias: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        linear: "f32[6, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[6, 2, 16]" = linear * view
        linear_1: "f32[6, 2, 80]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[6, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[6, 2, 80]" = linear_2 + bias
        add_1: "f32[6, 2, 80]" = add + linear_1
        to: "f32[6, 2, 80]" = add_1.to(torch.float32)
        scale_rows: "f32[6, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = bias, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_row_with_bias():
    backend = capture(adapted(row(bias=True, skip_bias_add=False)), IN)
    assert_expected_inline(
        graph_text(backend.after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[6, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", bias: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        linear: "f32[6, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[6, 2, 16]" = linear * view
        linear_1: "f32[6, 2, 80]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[6, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add_1: "f32[6, 2, 80]" = linear_2 + bias
        add_2: "f32[6, 2, 80]" = add_1 + linear_1
        to: "f32[6, 2, 80]" = add_2.to(torch.float32)
        scale_rows: "f32[6, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = bias, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_linear_with_dropout():
    backend = capture(adapted(nn.Linear(IN, 80), dropout=0.25), IN)
    assert_expected_inline(
        graph_text(backend.after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[6, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", bias: "f32[80]", scaling: "f32[1]", threshold: "i64[1]", rescale: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        draw_dropout_key: "i64[3]" = dora_fx_function_dropout_draw_dropout_key(x, '')
        dropout: "f32[6, 2, 48]" = dora_fx_function_dropout_dropout(x, draw_dropout_key, threshold, rescale, False, False)
        cat: "f32[12, 2, 48]" = torch.cat((x, dropout))
        linear_1: "f32[12, 2, 80]" = torch._C._nn.linear(cat, weight)
        chunk = linear_1.chunk(2)
        getitem: "f32[6, 2, 80]" = chunk[0]
        getitem_1: "f32[6, 2, 80]" = chunk[1]
        add: "f32[6, 2, 80]" = getitem + bias
        trained_delta: "f32[80]" = dora_fx_function_row_scale_trained_delta(magnitude, dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        mul: "f32[6, 2, 80]" = getitem_1 * trained_delta
        linear_2: "f32[6, 2, 16]" = torch._C._nn.linear(dropout, lora_a)
        view: "f32[]" = scaling.view(())
        mul_1: "f32[6, 2, 16]" = linear_2 * view
        linear_3: "f32[6, 2, 80]" = torch._C._nn.linear(mul_1, lora_b)
        add_1: "f32[80]" = trained_delta + 1.0
        mul_2: "f32[6, 2, 80]" = linear_3 * add_1
        add_2: "f32[6, 2, 80]" = mul + mul_2
        to: "f32[6, 2, 80]" = add_2.to(torch.float32)
        add_3: "f32[6, 2, 80]" = add + to
        return (add_3,)
""",
    )


def test_checkpointed_column():
    assert_expected_inline(
        graph_text(capture(adapted(column()), IN, recompute=True).after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, x: "f32[6, 2, 48]", L_model_modules_linear_modules_to_wrap_parameters_weight_: "f32[80, 48]", L_model_modules_linear_modules_adapter_modules_linear_in_parameters_weight_: "f32[16, 48]", L_model_modules_linear_modules_adapter_modules_linear_out_parameters_weight_: "f32[80, 16]", L_model_modules_linear_modules_adapter_parameters_weight_magnitude_: "f32[80]", L_model_modules_linear_buffers_base_norm_sq_: "f32[80]", L_model_modules_linear_modules_adapter_buffers_scaling_factor_: "f32[1]", L_model_modules_linear_buffers_cached_delta_: "f32[80]", L_model_modules_linear_buffers_cached_grad_gain_: "f32[80]", L_model_modules_linear_buffers_cached_grad_scale_: "f32[80]"):
        l_model_modules_linear_modules_to_wrap_parameters_weight_ = L_model_modules_linear_modules_to_wrap_parameters_weight_
        l_model_modules_linear_modules_adapter_modules_linear_in_parameters_weight_ = L_model_modules_linear_modules_adapter_modules_linear_in_parameters_weight_
        l_model_modules_linear_modules_adapter_modules_linear_out_parameters_weight_ = L_model_modules_linear_modules_adapter_modules_linear_out_parameters_weight_
        l_model_modules_linear_modules_adapter_parameters_weight_magnitude_ = L_model_modules_linear_modules_adapter_parameters_weight_magnitude_
        l_model_modules_linear_buffers_base_norm_sq_ = L_model_modules_linear_buffers_base_norm_sq_
        l_model_modules_linear_modules_adapter_buffers_scaling_factor_ = L_model_modules_linear_modules_adapter_buffers_scaling_factor_
        l_model_modules_linear_buffers_cached_delta_ = L_model_modules_linear_buffers_cached_delta_
        l_model_modules_linear_buffers_cached_grad_gain_ = L_model_modules_linear_buffers_cached_grad_gain_
        l_model_modules_linear_buffers_cached_grad_scale_ = L_model_modules_linear_buffers_cached_grad_scale_

        wrap_body_0 = self.wrap_body_0
        tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, x, l_model_modules_linear_modules_to_wrap_parameters_weight_, l_model_modules_linear_buffers_base_norm_sq_, l_model_modules_linear_modules_adapter_modules_linear_in_parameters_weight_, l_model_modules_linear_modules_adapter_modules_linear_out_parameters_weight_, l_model_modules_linear_modules_adapter_parameters_weight_magnitude_, l_model_modules_linear_modules_adapter_buffers_scaling_factor_, l_model_modules_linear_buffers_cached_delta_, l_model_modules_linear_buffers_cached_grad_gain_, l_model_modules_linear_buffers_cached_grad_scale_, use_reentrant = False)
        getitem: "f32[6, 2, 80]" = tag_activation_checkpoint[0]
        return (getitem,)

    class wrap_body_0(torch.nn.Module):
        def forward(self, x: "f32[6, 2, 48]", l_model_modules_linear_modules_to_wrap_parameters_weight_: "f32[80, 48]", l_model_modules_linear_buffers_base_norm_sq_: "f32[80]", l_model_modules_linear_modules_adapter_modules_linear_in_parameters_weight_: "f32[16, 48]", l_model_modules_linear_modules_adapter_modules_linear_out_parameters_weight_: "f32[80, 16]", l_model_modules_linear_modules_adapter_parameters_weight_magnitude_: "f32[80]", l_model_modules_linear_modules_adapter_buffers_scaling_factor_: "f32[1]", l_model_modules_linear_buffers_cached_delta_: "f32[80]", l_model_modules_linear_buffers_cached_grad_gain_: "f32[80]", l_model_modules_linear_buffers_cached_grad_scale_: "f32[80]"):
            linear: "f32[6, 2, 16]" = torch._C._nn.linear(x, l_model_modules_linear_modules_adapter_modules_linear_in_parameters_weight_)
            view: "f32[]" = l_model_modules_linear_modules_adapter_buffers_scaling_factor_.view(())
            mul: "f32[6, 2, 16]" = linear * view
            linear_1: "f32[6, 2, 80]" = torch._C._nn.linear(mul, l_model_modules_linear_modules_adapter_modules_linear_out_parameters_weight_)
            linear_2: "f32[6, 2, 80]" = torch._C._nn.linear(x, l_model_modules_linear_modules_to_wrap_parameters_weight_, None)
            add: "f32[6, 2, 80]" = linear_2 + linear_1
            to: "f32[6, 2, 80]" = add.to(torch.float32)
            scale_rows: "f32[6, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = l_model_modules_linear_modules_adapter_parameters_weight_magnitude_, scale = dora_fx_function_row_scale_RowScale(l_model_modules_linear_buffers_cached_delta_, l_model_modules_linear_buffers_cached_grad_gain_, l_model_modules_linear_buffers_cached_grad_scale_))
            return (scale_rows,)
""",
    )


class Gated(nn.Module):
    """A layer whose output is cut into a gate and what it gates, as in a Megatron MLP."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = adapted(linear).linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.chunk(self.linear(x)[0], 2, dim=-1)
        return F.silu(gate) * up


def test_gated_column():
    [gm] = capture(Gated(column()), IN).after
    text = graph_text(gm)
    assert_expected_inline(
        text[text.index("add: ") :],
        """\
add: "f32[6, 2, 80]" = linear_2 + linear_1
        to: "f32[6, 2, 80]" = add.to(torch.float32)

        split = to.split((40, 40), -1)
        split_1 = magnitude.split((40, 40), -1)
        split_2 = delta.split((40, 40), -1)
        split_3 = grad_gain.split((40, 40), -1)
        split_4 = grad_scale.split((40, 40), -1)
        getitem_4: "f32[6, 2, 40]" = split[0]
        getitem_5: "f32[40]" = split_1[0]
        getitem_6: "f32[40]" = split_2[0]
        getitem_7: "f32[40]" = split_3[0]
        getitem_8: "f32[40]" = split_4[0]
        scale_rows_1: "f32[6, 2, 40]" = dora_fx_function_row_scale_scale_rows(getitem_4, bias = None, magnitude = getitem_5, scale = dora_fx_function_row_scale_RowScale(getitem_6, getitem_7, getitem_8))
        getitem_9: "f32[6, 2, 40]" = split[1]
        getitem_10: "f32[40]" = split_1[1]
        getitem_11: "f32[40]" = split_2[1]
        getitem_12: "f32[40]" = split_3[1]
        getitem_13: "f32[40]" = split_4[1]
        scale_rows_2: "f32[6, 2, 40]" = dora_fx_function_row_scale_scale_rows(getitem_9, bias = None, magnitude = getitem_10, scale = dora_fx_function_row_scale_RowScale(getitem_11, getitem_12, getitem_13))

        silu: "f32[6, 2, 40]" = torch.nn.functional.silu(scale_rows_1)
        mul: "f32[6, 2, 40]" = silu * scale_rows_2
        return (mul,)
""",
    )
