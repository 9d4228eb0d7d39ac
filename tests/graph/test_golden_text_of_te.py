"""Golden text of rewritten graphs of layers over Transformer Engine, with emulated kernels, of which none is in them."""

from __future__ import annotations

from typing import Any

import pytest
from expecttest import assert_expected_inline

from tests.distributed.launch import call_in_process
from tests.graph.te_sites import text_of

pytestmark = pytest.mark.usefixtures("emulated_te")


def text(
    name: str,
    tp: int = 1,
    *,
    sequence_parallel: bool = False,
    dropout: float = 0.0,
    before: bool = False,
    **settings: Any,
) -> str:
    found: str = call_in_process(text_of, name, tp, sequence_parallel, dropout, before, settings)
    return found


def test_before_emulated_kernels():
    assert_expected_inline(
        text("TELayerNormColumnParallelLinear", before=True),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[8, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", norm_weight: "f32[48]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        output: "f32[8, 2, 80]" = dora_fx_modules_marker_dora_linear(x = x, weight = weight, base_norm_sq = base_norm_sq, lora_a = lora_a, lora_b = lora_b, magnitude = magnitude, scaling = scaling, layout_name = 'column', dtype = torch.float32, cached_delta = delta, cached_grad_gain = grad_gain, cached_grad_scale = grad_scale, norm_weight = norm_weight, norm_name = 'RMSNorm', norm_eps = 1e-05, norm_zero_centered = False)
        return (output,)
""",
    )


def test_norm_column_emulated_kernels():
    assert_expected_inline(
        text("TELayerNormColumnParallelLinear"),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[8, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", norm_weight: "f32[48]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        rms_norm: "f32[8, 2, 48]" = dora_fx_function_input_norm_rms_norm(x, norm_weight, 1e-05, False)
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(rms_norm, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 80]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(rms_norm, weight, None)
        add: "f32[8, 2, 80]" = linear_2 + linear_1
        to: "f32[8, 2, 80]" = add.to(torch.float32)
        scale_rows: "f32[8, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_layer_norm_column_with_bias_emulated_kernels():
    settings = dict(normalization="LayerNorm", layernorm_zero_centered_gamma=True, bias=True, skip_bias_add=False)
    assert_expected_inline(
        text("TELayerNormColumnParallelLinear", **settings),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[8, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", bias: "f32[80]", norm_weight: "f32[48]", norm_bias: "f32[48]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        layer_norm: "f32[8, 2, 48]" = dora_fx_function_input_norm_layer_norm(x, norm_weight, norm_bias, 1e-05, True)
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(layer_norm, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 80]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(layer_norm, weight, None)
        add: "f32[8, 2, 80]" = linear_2 + bias
        add_1: "f32[8, 2, 80]" = add + linear_1
        to: "f32[8, 2, 80]" = add_1.to(torch.float32)
        scale_rows: "f32[8, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = bias, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_norm_column_sequence_parallel_on_two_ranks_emulated_kernels():
    assert_expected_inline(
        text("TELayerNormColumnParallelLinear", 2, sequence_parallel=True),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[40, 48]", x: "f32[8, 2, 48]", lora_a: "f32[8, 48]", lora_b: "f32[40, 16]", magnitude: "f32[40]", base_norm_sq: "f32[40]", norm_weight: "f32[48]", scaling: "f32[1]", delta: "f32[40]", grad_gain: "f32[40]", grad_scale: "f32[40]", whole_lora_a: "f32[16, 48]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_a], 'tp', [whole_lora_a])
        getitem: "f32[16, 48]" = substitute_gathered_rows[0]
        rms_norm: "f32[8, 2, 48]" = dora_fx_function_input_norm_rms_norm(x, norm_weight, 1e-05, False)
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(rms_norm, getitem)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        gather_sequence: "f32[16, 2, 16]" = dora_fx_function_collectives_gather_sequence(mul, 'tp')
        linear_1: "f32[16, 2, 40]" = torch._C._nn.linear(gather_sequence, lora_b)
        gather_sequence_1: "f32[16, 2, 48]" = dora_fx_function_collectives_gather_sequence(rms_norm, 'tp')
        linear_2: "f32[16, 2, 40]" = torch._C._nn.linear(gather_sequence_1, weight, None)
        add: "f32[16, 2, 40]" = linear_2 + linear_1
        to: "f32[16, 2, 40]" = add.to(torch.float32)
        scale_rows: "f32[16, 2, 40]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_norm_column_on_eight_ranks_emulated_kernels():
    assert_expected_inline(
        text("TELayerNormColumnParallelLinear", 8),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[10, 48]", x: "f32[8, 2, 48]", lora_a: "f32[2, 48]", lora_b: "f32[10, 16]", magnitude: "f32[10]", base_norm_sq: "f32[10]", norm_weight: "f32[48]", scaling: "f32[1]", delta: "f32[10]", grad_gain: "f32[10]", grad_scale: "f32[10]", whole_lora_a: "f32[16, 48]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_a], 'tp', [whole_lora_a])
        getitem: "f32[16, 48]" = substitute_gathered_rows[0]
        rms_norm: "f32[8, 2, 48]" = dora_fx_function_input_norm_rms_norm(x, norm_weight, 1e-05, False)
        copy_to_group: "f32[8, 2, 48]" = dora_fx_function_collectives_copy_to_group(rms_norm, 'tp')
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(copy_to_group, getitem)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 10]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[8, 2, 10]" = torch._C._nn.linear(copy_to_group, weight, None)
        add: "f32[8, 2, 10]" = linear_2 + linear_1
        to: "f32[8, 2, 10]" = add.to(torch.float32)
        scale_rows: "f32[8, 2, 10]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_row_with_bias_on_two_ranks_emulated_kernels():
    assert_expected_inline(
        text("TERowParallelLinear", 2, bias=True, skip_bias_add=False),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 24]", x: "f32[8, 2, 24]", lora_a: "f32[16, 24]", lora_b: "f32[40, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", bias: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]", whole_lora_b: "f32[80, 16]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_b], 'tp', [whole_lora_b])
        getitem: "f32[80, 16]" = substitute_gathered_rows[0]
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 80]" = torch._C._nn.linear(mul, getitem)
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[8, 2, 80]" = linear_2 + linear_1
        reduce_from_group: "f32[8, 2, 80]" = dora_fx_function_collectives_reduce_from_group(add, 'tp')
        add_1: "f32[8, 2, 80]" = reduce_from_group + bias
        to: "f32[8, 2, 80]" = add_1.to(torch.float32)
        scale_rows: "f32[8, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = bias, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_row_sequence_parallel_on_eight_ranks_emulated_kernels():
    assert_expected_inline(
        text("TERowParallelLinear", 8, sequence_parallel=True),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 6]", x: "f32[8, 2, 6]", lora_a: "f32[16, 6]", lora_b: "f32[10, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]", whole_lora_b: "f32[80, 16]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_b], 'tp', [whole_lora_b])
        getitem: "f32[80, 16]" = substitute_gathered_rows[0]
        copy_to_group_coalesced = dora_fx_function_collectives_copy_to_group_coalesced([magnitude], 'tp')
        getitem_1: "f32[80]" = copy_to_group_coalesced[0]
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 80]" = torch._C._nn.linear(mul, getitem)
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[8, 2, 80]" = linear_2 + linear_1
        reduce_scatter_sequence: "f32[1, 2, 80]" = dora_fx_function_collectives_reduce_scatter_sequence(add, 'tp')
        to: "f32[1, 2, 80]" = reduce_scatter_sequence.to(torch.float32)
        scale_rows: "f32[1, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = getitem_1, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_column_on_two_ranks_emulated_kernels():
    assert_expected_inline(
        text("TEColumnParallelLinear", 2),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[40, 48]", x: "f32[8, 2, 48]", lora_a: "f32[8, 48]", lora_b: "f32[40, 16]", magnitude: "f32[40]", base_norm_sq: "f32[40]", scaling: "f32[1]", delta: "f32[40]", grad_gain: "f32[40]", grad_scale: "f32[40]", whole_lora_a: "f32[16, 48]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_a], 'tp', [whole_lora_a])
        getitem: "f32[16, 48]" = substitute_gathered_rows[0]
        copy_to_group: "f32[8, 2, 48]" = dora_fx_function_collectives_copy_to_group(x, 'tp')
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(copy_to_group, getitem)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 40]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[8, 2, 40]" = torch._C._nn.linear(copy_to_group, weight, None)
        add: "f32[8, 2, 40]" = linear_2 + linear_1
        to: "f32[8, 2, 40]" = add.to(torch.float32)
        scale_rows: "f32[8, 2, 40]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_duplicated_on_two_ranks_emulated_kernels():
    assert_expected_inline(
        text("TELinear", 2),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[8, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        linear: "f32[8, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 80]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[8, 2, 80]" = linear_2 + linear_1
        to: "f32[8, 2, 80]" = add.to(torch.float32)
        scale_rows: "f32[8, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_duplicated_sequence_parallel_with_dropout_on_eight_ranks_emulated_kernels():
    assert_expected_inline(
        text("TELinear", 8, sequence_parallel=True, dropout=0.25),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 48]", x: "f32[8, 2, 48]", lora_a: "f32[16, 48]", lora_b: "f32[80, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", threshold: "i64[1]", rescale: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]"):

        copy_to_group_coalesced = dora_fx_function_collectives_copy_to_group_coalesced([lora_a, lora_b, magnitude], 'tp')
        getitem: "f32[16, 48]" = copy_to_group_coalesced[0]
        getitem_1: "f32[80, 16]" = copy_to_group_coalesced[1]
        getitem_2: "f32[80]" = copy_to_group_coalesced[2]
        draw_dropout_key: "i64[3]" = dora_fx_function_dropout_draw_dropout_key(x, 'tp')
        dropout: "f32[8, 2, 48]" = dora_fx_function_dropout_dropout(x, draw_dropout_key, threshold, rescale, False, True)
        cat: "f32[16, 2, 48]" = torch.cat((x, dropout))
        linear: "f32[16, 2, 80]" = torch._C._nn.linear(cat, weight)
        chunk = linear.chunk(2)
        getitem_3: "f32[8, 2, 80]" = chunk[0]
        getitem_4: "f32[8, 2, 80]" = chunk[1]
        trained_delta: "f32[80]" = dora_fx_function_row_scale_trained_delta(getitem_2, dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        mul: "f32[8, 2, 80]" = getitem_4 * trained_delta
        linear_1: "f32[8, 2, 16]" = torch._C._nn.linear(dropout, getitem)
        view: "f32[]" = scaling.view(())
        mul_1: "f32[8, 2, 16]" = linear_1 * view
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(mul_1, getitem_1)
        add: "f32[80]" = trained_delta + 1.0
        mul_2: "f32[8, 2, 80]" = linear_2 * add
        add_1: "f32[8, 2, 80]" = mul + mul_2
        to: "f32[8, 2, 80]" = add_1.to(torch.float32)
        add_2: "f32[8, 2, 80]" = getitem_3 + to
        return (add_2,)
""",
    )
