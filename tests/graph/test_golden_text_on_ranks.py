"""Golden text of rewritten graphs on tensor-parallel ranks, traced with the fake process group."""

from __future__ import annotations

from expecttest import assert_expected_inline

from tests.graph.capture import capture
from tests.graph.sites import IN, adapted, column, row
from tests.recording_backend import graph_text


def test_column_on_two_ranks(tensor_parallel):
    tensor_parallel(2)
    backend = capture(adapted(column(tensor_model_parallel_size=2)), IN)
    assert_expected_inline(
        graph_text(backend.after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[40, 48]", x: "f32[6, 2, 48]", lora_a: "f32[8, 48]", lora_b: "f32[40, 16]", magnitude: "f32[40]", base_norm_sq: "f32[40]", scaling: "f32[1]", delta: "f32[40]", grad_gain: "f32[40]", grad_scale: "f32[40]", whole_lora_a: "f32[16, 48]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_a], 'tp', [whole_lora_a])
        getitem_1: "f32[16, 48]" = substitute_gathered_rows[0]
        copy_to_group: "f32[6, 2, 48]" = dora_fx_function_collectives_copy_to_group(x, 'tp')
        linear: "f32[6, 2, 16]" = torch._C._nn.linear(copy_to_group, getitem_1)
        view: "f32[]" = scaling.view(())
        mul: "f32[6, 2, 16]" = linear * view
        linear_1: "f32[6, 2, 40]" = torch._C._nn.linear(mul, lora_b)
        linear_2: "f32[6, 2, 40]" = torch._C._nn.linear(copy_to_group, weight, None)
        add: "f32[6, 2, 40]" = linear_2 + linear_1
        to: "f32[6, 2, 40]" = add.to(torch.float32)
        scale_rows: "f32[6, 2, 40]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_row_on_two_ranks(tensor_parallel):
    tensor_parallel(2)
    backend = capture(adapted(row(tensor_model_parallel_size=2)), IN // 2)
    assert_expected_inline(
        graph_text(backend.after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 24]", x: "f32[6, 2, 24]", lora_a: "f32[16, 24]", lora_b: "f32[40, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]", whole_lora_b: "f32[80, 16]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_b], 'tp', [whole_lora_b])
        getitem_2: "f32[80, 16]" = substitute_gathered_rows[0]
        linear: "f32[6, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[6, 2, 16]" = linear * view
        linear_1: "f32[6, 2, 80]" = torch._C._nn.linear(mul, getitem_2)
        linear_2: "f32[6, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[6, 2, 80]" = linear_2 + linear_1
        reduce_from_group: "f32[6, 2, 80]" = dora_fx_function_collectives_reduce_from_group(add, 'tp')
        to: "f32[6, 2, 80]" = reduce_from_group.to(torch.float32)
        scale_rows: "f32[6, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_row_sequence_parallel_with_dropout_on_two_ranks(tensor_parallel):
    tensor_parallel(2)
    model = adapted(row(tensor_model_parallel_size=2, sequence_parallel=True), dropout=0.25)
    assert_expected_inline(
        graph_text(capture(model, IN // 2).after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 24]", x: "f32[6, 2, 24]", lora_a: "f32[16, 24]", lora_b: "f32[40, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", threshold: "i64[1]", rescale: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]", whole_lora_b: "f32[80, 16]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_b], 'tp', [whole_lora_b])
        getitem_2: "f32[80, 16]" = substitute_gathered_rows[0]
        copy_to_group_coalesced = dora_fx_function_collectives_copy_to_group_coalesced([magnitude], 'tp')
        getitem_3: "f32[80]" = copy_to_group_coalesced[0]
        draw_dropout_key: "i64[3]" = dora_fx_function_dropout_draw_dropout_key(x, 'tp')
        dropout: "f32[6, 2, 24]" = dora_fx_function_dropout_dropout(x, draw_dropout_key, threshold, rescale, True, False)
        cat: "f32[12, 2, 24]" = torch.cat((x, dropout))
        linear: "f32[12, 2, 80]" = torch._C._nn.linear(cat, weight)
        chunk = linear.chunk(2)
        getitem_4: "f32[6, 2, 80]" = chunk[0]
        getitem_5: "f32[6, 2, 80]" = chunk[1]
        trained_delta: "f32[80]" = dora_fx_function_row_scale_trained_delta(getitem_3, dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        mul: "f32[6, 2, 80]" = getitem_5 * trained_delta
        linear_1: "f32[6, 2, 16]" = torch._C._nn.linear(dropout, lora_a)
        view: "f32[]" = scaling.view(())
        mul_1: "f32[6, 2, 16]" = linear_1 * view
        linear_2: "f32[6, 2, 80]" = torch._C._nn.linear(mul_1, getitem_2)
        add: "f32[80]" = trained_delta + 1.0
        mul_2: "f32[6, 2, 80]" = linear_2 * add
        add_1: "f32[6, 2, 80]" = mul + mul_2
        to: "f32[6, 2, 80]" = add_1.to(torch.float32)
        add_2: "f32[6, 2, 80]" = getitem_4 + to
        reduce_scatter_sequence: "f32[3, 2, 80]" = dora_fx_function_collectives_reduce_scatter_sequence(add_2, 'tp')
        return (reduce_scatter_sequence,)
""",
    )


def test_column_sequence_parallel_on_eight_ranks(tensor_parallel):
    tensor_parallel(8)
    model = adapted(column(tensor_model_parallel_size=8, sequence_parallel=True))
    assert_expected_inline(
        graph_text(capture(model, IN, sequence=1).after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[10, 48]", x: "f32[1, 2, 48]", lora_a: "f32[2, 48]", lora_b: "f32[10, 16]", magnitude: "f32[10]", base_norm_sq: "f32[10]", scaling: "f32[1]", delta: "f32[10]", grad_gain: "f32[10]", grad_scale: "f32[10]", whole_lora_a: "f32[16, 48]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_a], 'tp', [whole_lora_a])
        getitem_2: "f32[16, 48]" = substitute_gathered_rows[0]
        linear: "f32[1, 2, 16]" = torch._C._nn.linear(x, getitem_2)
        view: "f32[]" = scaling.view(())
        mul: "f32[1, 2, 16]" = linear * view
        gather_sequence: "f32[8, 2, 16]" = dora_fx_function_collectives_gather_sequence(mul, 'tp')
        linear_1: "f32[8, 2, 10]" = torch._C._nn.linear(gather_sequence, lora_b)
        gather_sequence_1: "f32[8, 2, 48]" = dora_fx_function_collectives_gather_sequence(x, 'tp')
        linear_2: "f32[8, 2, 10]" = torch._C._nn.linear(gather_sequence_1, weight, None)
        add: "f32[8, 2, 10]" = linear_2 + linear_1
        to: "f32[8, 2, 10]" = add.to(torch.float32)
        scale_rows: "f32[8, 2, 10]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = magnitude, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )


def test_row_sequence_parallel_on_eight_ranks(tensor_parallel):
    tensor_parallel(8)
    model = adapted(row(tensor_model_parallel_size=8, sequence_parallel=True))
    assert_expected_inline(
        graph_text(capture(model, IN // 8, sequence=8).after[0]),
        """\
class GraphModule(torch.nn.Module):
    def forward(self, weight: "f32[80, 6]", x: "f32[8, 2, 6]", lora_a: "f32[16, 6]", lora_b: "f32[10, 16]", magnitude: "f32[80]", base_norm_sq: "f32[80]", scaling: "f32[1]", delta: "f32[80]", grad_gain: "f32[80]", grad_scale: "f32[80]", whole_lora_b: "f32[80, 16]"):

        substitute_gathered_rows = dora_fx_function_collectives_substitute_gathered_rows([lora_b], 'tp', [whole_lora_b])
        getitem_2: "f32[80, 16]" = substitute_gathered_rows[0]
        copy_to_group_coalesced = dora_fx_function_collectives_copy_to_group_coalesced([magnitude], 'tp')
        getitem_3: "f32[80]" = copy_to_group_coalesced[0]
        linear: "f32[8, 2, 16]" = torch._C._nn.linear(x, lora_a)
        view: "f32[]" = scaling.view(())
        mul: "f32[8, 2, 16]" = linear * view
        linear_1: "f32[8, 2, 80]" = torch._C._nn.linear(mul, getitem_2)
        linear_2: "f32[8, 2, 80]" = torch._C._nn.linear(x, weight, None)
        add: "f32[8, 2, 80]" = linear_2 + linear_1
        reduce_scatter_sequence: "f32[1, 2, 80]" = dora_fx_function_collectives_reduce_scatter_sequence(add, 'tp')
        to: "f32[1, 2, 80]" = reduce_scatter_sequence.to(torch.float32)
        scale_rows: "f32[1, 2, 80]" = dora_fx_function_row_scale_scale_rows(to, bias = None, magnitude = getitem_3, scale = dora_fx_function_row_scale_RowScale(delta, grad_gain, grad_scale))
        return (scale_rows,)
""",
    )
