"""The finder sees every shape of a Megatron linear call and says what it does not know."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from dora_fx.modules.marker import dora_linear
from dora_fx.passes import base_ops
from dora_fx.passes.dora_sites import find_dora_sites
from tests.closeness import assert_apart, assert_close, rounding
from tests.distributed.mutations import Mutation, planted
from tests.graph.capture import SEQUENCE, capture
from tests.graph.sites import IN, OneLinear, adapted, column, row
from tests.recording_backend import RecordingBackend


def sites_of(backend: RecordingBackend):
    return find_dora_sites(backend.before[0])


@pytest.mark.parametrize(
    ("layer", "op_names"),
    [
        (lambda: column(), ["matmul", "t", "view_as"]),
        (lambda: column(bias=True), ["matmul", "t", "view_as"]),
        (lambda: column(bias=True, skip_bias_add=False), ["add", "matmul", "t", "view_as"]),
        (lambda: row(), ["matmul", "t", "view_as"]),
        (lambda: row(bias=True, skip_bias_add=False), ["add", "matmul", "t", "view_as"]),
        (lambda: nn.Linear(IN, 80), ["linear"]),
    ],
)
def test_one_rank(tensor_parallel, layer, op_names):
    tensor_parallel(1)
    (site,) = sites_of(capture(adapted(layer()), IN))
    assert sorted(set(site.op_names) - {"getitem", "_set_grad_enabled"}) == op_names
    assert site.path == "linear"
    assert site.marked.stored.scaling.name.endswith("scaling_factor_")
    assert site.marked.stored.tp_group == ""


def test_flat_call_without_gradients(tensor_parallel):
    tensor_parallel(1)
    (site,) = sites_of(capture(adapted(row()), IN, grad=False))
    assert site.op_names == ("t", "matmul")


def test_bias_operand_is_the_one_the_layer_adds(tensor_parallel):
    tensor_parallel(1)
    (added,) = sites_of(capture(adapted(row(bias=True, skip_bias_add=False)), IN))
    assert added.marked.bias.name.endswith("bias_")
    torch._dynamo.reset()
    (returned,) = sites_of(capture(adapted(row(bias=True)), IN))
    assert returned.marked.bias is None


@pytest.mark.parametrize(
    ("layer", "features", "sequence", "layout", "collectives"),
    [
        (column, IN, SEQUENCE, "column", []),
        (row, IN // 2, SEQUENCE, "row", ["all_reduce"]),
        (
            lambda **cfg: column(gather_output=True, **cfg),
            IN,
            SEQUENCE,
            "column_gather_output",
            ["all_gather_into_tensor"],
        ),
        (lambda **cfg: row(input_is_parallel=False, **cfg), IN, SEQUENCE, "row_split_input", ["all_reduce"]),
    ],
)
def test_tensor_parallel(tensor_parallel, layer, features, sequence, layout, collectives):
    tensor_parallel(2)
    model = adapted(layer(tensor_model_parallel_size=2))
    (site,) = sites_of(capture(model, features, sequence=sequence))
    assert site.marked.stored.layout_name == layout
    assert [name for name in site.op_names if name.startswith(("all_", "reduce_scatter"))] == collectives


@pytest.mark.parametrize(
    ("layer", "features", "sequence", "collective"),
    [(column, IN, SEQUENCE // 2, "all_gather_into_tensor"), (row, IN // 2, SEQUENCE, "reduce_scatter_tensor")],
)
def test_sequence_parallel(tensor_parallel, layer, features, sequence, collective):
    tensor_parallel(2)
    model = adapted(layer(tensor_model_parallel_size=2, sequence_parallel=True))
    (site,) = sites_of(capture(model, features, sequence=sequence))
    assert site.marked.stored.layout_name.endswith("_sequence_parallel")
    assert collective in site.op_names


def test_in_place_write_of_a_collective_belongs_to_the_call(tensor_parallel):
    tensor_parallel(2)
    (site,) = sites_of(capture(adapted(row(tensor_model_parallel_size=2)), IN // 2, grad=False))
    assert "copy_" in site.op_names


def test_nested_in_a_checkpointed_region(tensor_parallel):
    tensor_parallel(1)
    backend = capture(adapted(column()), IN, recompute=True)
    (site,) = sites_of(backend)
    assert site.marker.graph is not backend.before[0].graph


def with_hook(hook: Callable[..., Any]) -> OneLinear:
    model = adapted(nn.Linear(IN, IN))
    model.linear.to_wrap.register_forward_hook(hook)
    return model


def scaled_by_hand(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.mul(output, 2)


@torch.library.custom_op("dora_fx_tests::linear", mutates_args=())
def linear(x: torch.Tensor) -> torch.Tensor:
    """An op of another library whose bare name is that of a product."""
    return x.clone()


linear.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        (lambda module, args, output: torch.tanh(output), r"ops that no Megatron linear has: \['tanh'\]"),
        (scaled_by_hand, r"ops that no Megatron linear has: \['mul'\]"),
        (lambda module, args, output: linear(output), r"ops that no Megatron linear has: \['linear'\]"),
        (lambda module, args, output: output @ torch.eye(IN), "2 matrix products, expected 1"),
        (lambda module, args, output: output + module.weight.sum(), r"ops that no Megatron linear has: \['sum'\]"),
        (lambda module, args, output: output + 1.0, "adds the product with the bias, 1.0, expected"),
        (lambda module, args, output: output + output, "adds the product with the bias, the product with the bias"),
    ],
)
def test_a_base_call_that_is_not_understood(tensor_parallel, hook, problem):
    tensor_parallel(1)
    (site,) = sites_of(capture(with_hook(hook), IN, grad=False))
    assert re.search(problem, site.problem)
    assert "sites.py" in site.problem
    assert site.base_call == ()


# Square layers of square inputs, whose operands could stand for each other; with what is no W0 x about them.
FORWARDS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str | None]] = {
    "product": (F.linear, None),
    "product of the transposed": (lambda x, weight: torch.matmul(x, weight.t()), None),
    "views": (lambda x, weight: F.linear(x.view(-1, IN), weight.t().t()).view_as(weight), None),
    "x by x": (lambda x, weight: F.linear(x, x) + weight, "linear of its base call takes x, x, expected x, weight"),
    "weight by x": (lambda x, weight: F.linear(weight, x), "takes weight, x, expected x, weight"),
    "not transposed": (lambda x, weight: x @ weight, r"takes x, weight, expected x, weight.t\(\)"),
    "transposed result": (
        lambda x, weight: F.linear(x, weight).t(),
        r"returns the product.t\(\), expected the product",
    ),
    "residual": (lambda x, weight: F.linear(x, weight) + x, "adds the product, x, expected the product and"),
    "weight as bias": (lambda x, weight: F.linear(x, weight).add(weight), "adds the product, weight, expected"),
    "scaled addend": (lambda x, weight: torch.add(F.linear(x, weight), weight, alpha=2), "adds the product, weight, 2"),
    "two halves": (lambda x, weight: torch.cat((x.chunk(2)[0], F.linear(x, weight).chunk(2)[0])), "joins|also used by"),
}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_product_of_other_operands_is_no_base_call(tensor_parallel, recompute):
    """The layer's own function runs beside its adapter, as in eager code; none of it is left out."""
    tensor_parallel(1)
    model = adapted(nn.Linear(IN, IN, bias=False))
    base = model.linear.to_wrap
    x = torch.randn(IN, IN)
    for name, (forward, problem) in FORWARDS.items():
        torch._dynamo.reset()
        base.forward = lambda x, forward=forward: forward(x, base.weight)
        backend = RecordingBackend()
        call = (lambda x: checkpoint(model, x, use_reentrant=False)) if recompute else model
        output = torch.compile(call, backend=backend, fullgraph=True)(x)
        [site] = sites_of(backend)
        assert (site.problem is None) == (problem is None), (name, site.problem)
        assert problem is None or re.search(problem, site.problem), (name, site.problem)
        assert_close(output, model(x), rounding(torch.float32, IN))


def test_a_function_without_a_body_is_declined(tensor_parallel):
    tensor_parallel(1)
    gm = capture(adapted(row()), IN).before[0]
    call, *_ = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.autograd_function_apply)
    setattr(gm, call.args[0].target, nn.Identity())
    (site,) = find_dora_sites(gm)
    assert site.problem.startswith(f"the forward body of {call.name}, in its base call, is not in the graph (")


def test_long_arithmetic_on_sizes_and_long_views_are_read_once_each():
    graph = fx.Graph()
    size = graph.placeholder("size")
    view = graph.placeholder("view")
    size.meta["example_value"] = 1
    for _ in range(3000):
        size = graph.call_function(operator.add, (size, size))
        size.meta["example_value"] = 1
        view = graph.call_method("view_as", (view, view))
    written = graph.call_method("copy_", (view, view))
    assert len(base_ops.size_nodes(graph)) == 3001
    assert len(base_ops.write_nodes(graph)) == 3001 and written in base_ops.write_nodes(graph)


@torch.library.custom_op("dora_fx_tests_of_fp8::linear", mutates_args=())
def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product in FP8, under the name that Transformer Engine gives its op."""
    rounded = [tensor.to(torch.float8_e4m3fn).to(tensor.dtype) for tensor in (x, weight)]
    return rounded[0] @ rounded[1].t()


fp8_linear.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))

OPS_BY_BARE_NAME = Mutation(
    "ops matched by bare name",
    base_ops.op_of,
    "return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target",
    'by_name = {getattr(op, "__name__", op): op for op in PRODUCTS}\n'
    '    return by_name.get(getattr(node.target, "__name__", "").partition(".")[0], node.target)',
)


def test_an_fp8_call_is_no_matmul(tensor_parallel):
    tensor_parallel(1)
    model = adapted(nn.Linear(IN, IN, bias=False))
    base = model.linear.to_wrap
    base.forward = lambda x: fp8_linear(x, base.weight)
    x = torch.randn(SEQUENCE, 2, IN)
    expected = model(x)

    def compiled() -> tuple[str | None, torch.Tensor]:
        torch._dynamo.reset()
        backend = RecordingBackend()
        output = torch.compile(model, backend=backend)(x)
        (site,) = sites_of(backend)
        return site.problem, output

    problem, output = compiled()
    assert "0 matrix products, expected 1; ops are ['linear']" in problem
    assert_close(output, expected, rounding(torch.float32, IN))
    with planted(OPS_BY_BARE_NAME):
        problem, output = compiled()
    assert problem is None
    assert_apart(output, expected, 0.01)


def test_base_output_used_elsewhere(tensor_parallel):
    tensor_parallel(1)
    outputs: list[torch.Tensor] = []
    model = with_hook(lambda module, args, output: outputs.append(output))

    def both(x: torch.Tensor) -> torch.Tensor:
        outputs.clear()
        return model(x) + outputs[0]

    backend = RecordingBackend()
    torch.compile(both, backend=backend, fullgraph=True)(torch.randn(3, IN))
    (site,) = sites_of(backend)
    assert "base output is also used by" in site.problem


SYMBOLIC_LAYERS = {
    "column": column,
    "column_bias": lambda **cfg: column(bias=True, skip_bias_add=False, **cfg),
    "column_gather": lambda **cfg: column(gather_output=True, **cfg),
    "row": row,
    "row_bias": lambda **cfg: row(bias=True, skip_bias_add=False, **cfg),
    "row_split": lambda **cfg: row(input_is_parallel=False, **cfg),
}
# Every layer with and without sequence parallelism, and in turn with and without gradients: a site's ops are found the
# same way. Megatron refuses sequence parallelism with a split input.
SYMBOLIC = [
    *((name, sequence_parallel, (number + sequence_parallel) % 2 == 0)
      for number, name in enumerate(SYMBOLIC_LAYERS) if name != "row_split" for sequence_parallel in (False, True)),
    ("row_split", False, True),
    ("row_split", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "sequence_parallel", "grad"), SYMBOLIC)
def test_symbolic_sizes_are_no_work_on_tensors(tensor_parallel, layer, sequence_parallel, grad):
    """The ops of a site are the same whether lengths are numbers or symbols."""
    tensor_parallel(2)
    model = adapted(SYMBOLIC_LAYERS[layer](tensor_model_parallel_size=2, sequence_parallel=sequence_parallel))
    features = model.linear.base_weight.shape[1] * (2 if model.linear.adapter.layout.enter == "split_features" else 1)
    backend = RecordingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for length in (4, 8, 6):
            compiled(torch.randn(length, 2, features, requires_grad=grad))
    static, dynamic = map(find_dora_sites, backend.before)
    assert "Sym(" in backend.before[1].print_readable(print_output=False)
    assert [site.problem for site in (*static, *dynamic)] == [None, None]
    assert static[0].op_names == dynamic[0].op_names
    assert all(dora_linear not in {node.target for node in after.graph.nodes} for after in backend.after)


def test_a_size_that_others_use_stays(tensor_parallel):
    tensor_parallel(1)
    model = adapted(column())

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = model(x)[0]
        return y * (2 * x.shape[0])

    backend = RecordingBackend()
    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=True)
    x = torch.randn(5, 2, IN)
    assert_close(compiled(x), forward(x), rounding(torch.float32, IN))
    (site,) = sites_of(backend)
    assert site.problem is None


def test_unadapted_layers_are_no_sites(tensor_parallel):
    tensor_parallel(1)
    assert sites_of(capture(OneLinear(column()), IN)) == []
