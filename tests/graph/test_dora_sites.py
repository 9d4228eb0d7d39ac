"""The finder sees every shape of a Megatron linear call and refuses what it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_fx.passes.dora_sites import UnsupportedDoRASiteError, find_dora_sites
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
    assert site.operands["scaling"] == 2.0
    assert site.operands["tp_group"] == ""


def test_flat_call_without_gradients(tensor_parallel):
    tensor_parallel(1)
    (site,) = sites_of(capture(adapted(row()), IN, grad=False))
    assert site.op_names == ("t", "matmul")


def test_bias_operand_is_the_one_the_layer_adds(tensor_parallel):
    tensor_parallel(1)
    (added,) = sites_of(capture(adapted(row(bias=True, skip_bias_add=False)), IN))
    assert added.operands["bias"].name.endswith("bias_")
    torch._dynamo.reset()
    (returned,) = sites_of(capture(adapted(row(bias=True)), IN))
    assert returned.operands["bias"] is None


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
    assert site.operands["layout"] == layout
    assert [name for name in site.op_names if name.startswith(("all_", "reduce_scatter"))] == collectives


@pytest.mark.parametrize(
    ("layer", "features", "sequence", "collective"),
    [(column, IN, SEQUENCE // 2, "all_gather_into_tensor"), (row, IN // 2, SEQUENCE, "reduce_scatter_tensor")],
)
def test_sequence_parallel(tensor_parallel, layer, features, sequence, collective):
    tensor_parallel(2)
    model = adapted(layer(tensor_model_parallel_size=2, sequence_parallel=True))
    (site,) = sites_of(capture(model, features, sequence=sequence))
    assert site.operands["layout"].endswith("_sequence_parallel")
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


def test_unknown_op_in_the_base_call_is_refused_by_name(tensor_parallel):
    tensor_parallel(1)
    model = adapted(nn.Linear(IN, IN))
    model.linear.to_wrap.register_forward_hook(lambda module, args, output: torch.tanh(output))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"linear: cannot rewrite .*'tanh'") as error:
        capture(model, IN)
    assert isinstance(error.value.inner_exception, UnsupportedDoRASiteError)
    assert "layers.py" in str(error.value)


def test_base_output_used_elsewhere_is_refused(tensor_parallel):
    tensor_parallel(1)
    model = adapted(nn.Linear(IN, IN))
    outputs: list[torch.Tensor] = []
    model.linear.to_wrap.register_forward_hook(lambda module, args, output: outputs.append(output))

    def both(x: torch.Tensor) -> torch.Tensor:
        outputs.clear()
        return model(x) + outputs[0]

    backend = RecordingBackend()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="base output is also used by"):
        torch.compile(both, backend=backend, fullgraph=True)(torch.randn(3, IN))


def test_unadapted_layers_are_no_sites(tensor_parallel):
    tensor_parallel(1)
    assert sites_of(capture(OneLinear(column()), IN)) == []
