"""Bad input is refused with the module's path, what was found and what was expected, and leaves the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dora_fx
from tests.models import DIM, GPT_TARGETS, IN, OUT, LinearZoo, adapt_zoo, sites, tiny_gpt, trainable
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a refused call must not change."""
    return {
        "modules": [(path, id(module), module.training) for path, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)},
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, so that NaN equals NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["parameters"] == before["parameters"]
    assert list(after["values"]) == list(before["values"])
    for name, value in before["values"].items():
        assert after["values"][name].dtype == value.dtype
        assert value.is_meta or torch.equal(bits(after["values"][name]), bits(value))


@contextlib.contextmanager
def refuses(error: type[Exception], *fragments: str) -> Iterator[None]:
    with pytest.raises(error) as raised:
        yield
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == []


@every_case(
    ("settings", "error", "fragments"),
    [
        (dict(dim=0), ValueError, ["dim", "0", "positive integer"]),
        (dict(dim=-4), ValueError, ["dim", "-4", "positive integer"]),
        (dict(dim=2.0), ValueError, ["dim", "2.0", "positive integer"]),
        (dict(dim=True), ValueError, ["dim", "True", "positive integer"]),
        (dict(alpha=float("nan")), ValueError, ["alpha", "nan", "positive finite number"]),
        (dict(alpha=float("inf")), ValueError, ["alpha", "inf", "positive finite number"]),
        (dict(alpha=0), ValueError, ["alpha", "0", "positive finite number"]),
        (dict(alpha=-1.0), ValueError, ["alpha", "-1.0", "positive finite number"]),
        (dict(dropout=1.0), ValueError, ["dropout", "1.0", "[0, 1)"]),
        (dict(dropout=-0.1), ValueError, ["dropout", "-0.1", "[0, 1)"]),
        (dict(dropout=float("nan")), ValueError, ["dropout", "nan", "[0, 1)"]),
        (dict(dropout="0.1"), ValueError, ["dropout", "'0.1'", "[0, 1)"]),
        (dict(dropout_position="post"), ValueError, ["dropout_position", "'post'", "'pre'"]),
        (dict(lora_A_init_method="gauss"), ValueError, ["lora_A_init_method", "'gauss'", "xavier"]),
        (dict(lora_B_init_method="ones"), ValueError, ["lora_B_init_method", "'ones'", "zero"]),
        (dict(lora_B_init_method=["zero"]), ValueError, ["lora_B_init_method", "['zero']", "'xavier'"]),
        (dict(complete_gradients=["auto"]), ValueError, ["complete_gradients", "['auto']", "'once_per_step'"]),
        (dict(exclude_modules=None), TypeError, ["exclude_modules", "None", "list"]),
        (dict(target_modules="linear_qkv"), TypeError, ["target_modules", "'linear_qkv'", "list"]),
        (dict(exclude_modules="linear_qkv"), TypeError, ["exclude_modules", "'linear_qkv'", "list"]),
    ],
    ids=str,
)
def test_field_out_of_range(settings: dict[str, Any], error: type[Exception], fragments: list[str]) -> None:
    with refuses(error, *fragments):
        dora_fx.DoRA(**settings)


def test_field_set_out_of_range_after_construction() -> None:
    model, dora = tiny_gpt(), dora_fx.DoRA()
    dora.dim = 0
    with unchanged(model), refuses(ValueError, "dim", "0", "positive integer"):
        dora(model)


def test_an_adapter_built_by_hand_out_of_range() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        (dict(dropout=1.0), r"dropout: found 1.0, expected a probability in \[0, 1\)"),
        (dict(dropout=float("nan")), "dropout: found nan, expected a probability"),
        (dict(dropout=None), "dropout: found None, expected a probability"),
        (dict(alpha="16"), "alpha: found '16', expected a positive finite number"),
        (dict(dim=2.0), "dim: found 2.0, expected a positive integer"),
        (dict(alpha=0), "alpha: found 0, expected a positive finite number"),
        (dict(alpha=float("inf")), "alpha: found inf, expected a positive finite number"),
        (dict(dim=0), "dim: found 0, expected a positive integer"),
        (dict(column_init_method="gauss"), r"column_init_method: found 'gauss', expected one of \['kaiming'"),
        (dict(row_init_method="ones"), r"row_init_method: found 'ones', expected one of \['kaiming'"),
        (dict(layout_name="columns"), r"layout_name: found 'columns', expected one of \['column'"),
        (dict(row_blocks=4), r"shard: found a tensor of shape \(6, 2\), expected a multiple of 4 in dimension 0"),
    ]
    for settings, message in refused:
        layout = {"layout_name": "column"} if "row_blocks" in settings else {}
        with pytest.raises(ValueError, match=f"^{message}"):
            dora_fx.ParallelLinearDoRAAdapter(8, 6, **{"dim": 2, **layout, **settings})
    with pytest.raises(TypeError, match=r"^use_rslora: found 'no', expected True or False"):
        dora_fx.ParallelLinearDoRAAdapter(8, 6, 2, use_rslora="no")  # type: ignore[arg-type]
    adapter = dora_fx.ParallelLinearDoRAAdapter(8, 6, 2, alpha=4, dropout=0.5)
    for name, value in (("alpha", -1.0), ("dropout", 1.0)):
        with pytest.raises(ValueError, match=f"^{name}: found {value}"):
            setattr(adapter, name, value)
    assert (adapter.alpha, adapter.dropout) == (4, 0.5)


def test_blocks_of_rows_that_megatron_saves_as_one() -> None:
    adapter = dora_fx.ParallelLinearDoRAAdapter(8, 6, 2, row_blocks=3)
    adapter.init_weight_magnitude(torch.ones(6))
    with refuses(ValueError, "layer.adapter.linear_out.weight: found 3 blocks of rows, expected 1 or 2"):
        adapter.sharded_state_dict("layer.adapter.")


def test_an_adapter_built_by_hand_for_another_layer() -> None:
    layer = nn.Linear(8, 6).requires_grad_(False)
    for settings, message in (
        (dict(in_features=6, out_features=8), "with in_features = 6, expected the layer's 8"),
        (dict(out_features=12), "with out_features = 12, expected the layer's 6"),
        (dict(layout_name="row"), "with layout_name = 'row', expected the layer's 'replicated'"),
        (dict(row_blocks=2), "with row_blocks = 2, expected the layer's 1"),
    ):
        adapter = dora_fx.ParallelLinearDoRAAdapter(**{"in_features": 8, "out_features": 6, "dim": 2, **settings})
        with unchanged(adapter), refuses(ValueError, f"a.layer: found an adapter {message}"):
            dora_fx.DoRALinear(layer, adapter, path="a.layer")
    adapter = dora_fx.ParallelLinearDoRAAdapter(8, 6, 2)
    with (
        unchanged(adapter),
        refuses(ValueError, "a.layer: found complete_gradients = 'never', expected one of ['auto'"),
    ):
        dora_fx.DoRALinear(layer, adapter, path="a.layer", complete_gradients="never")  # type: ignore[arg-type]


@every_case("targets", [["linear_qvk"], ["decoder.*.linear_qvk"], []])
def test_no_target_matched(targets: list[str]) -> None:
    model = tiny_gpt()
    with unchanged(model), refuses(ValueError, "target_modules", str(targets), "linear_qkv"):
        dora_fx.DoRA(targets, allow_unmatched=True)(model)


def test_one_of_the_targets_not_matched() -> None:
    model = tiny_gpt()
    with unchanged(model), refuses(ValueError, "'linear_fc3'", "linear_fc1", "allow_unmatched"):
        dora_fx.DoRA(["linear_qkv", "linear_fc3"])(model)


@every_case(
    ("target", "found"),
    [("mlp", "MLP"), ("embedding.word_embeddings", "VocabParallelEmbedding"), ("decoder.final_layernorm", "RMSNorm")],
)
def test_target_that_is_no_linear_layer(target: str, found: str) -> None:
    model = tiny_gpt()
    with unchanged(model), refuses(TypeError, target, found, "expected a linear layer"):
        dora_fx.DoRA(["linear_qkv", target])(model)


class ScaledLinear(nn.Linear):
    """A linear layer that computes something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


@every_case(
    "layer",
    [ScaledLinear(4, 4), nn.Bilinear(4, 4, 4), nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_class_that_is_not_supported(layer: nn.Module) -> None:
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)})
    with unchanged(model), refuses(TypeError, "odd", type(layer).__name__, "ColumnParallelLinear"):
        dora_fx.DoRA(["plain", "odd"])(model)


@every_case(
    ("spoil", "fragments"),
    [
        (lambda w: w.index_fill(0, torch.tensor([2, 5]), float("nan")), ["NaN", "2 of 40 rows", "row 2", "finite"]),
        (lambda w: w.index_fill(1, torch.tensor([0]), float("inf")), ["inf", "40 of 40 rows", "row 0", "finite"]),
        (lambda w: w.to("meta"), ["meta device"]),
        (lambda w: w.to(torch.int8), ["torch.int8", "quantised", "floating-point"]),
        (lambda w: w.to(torch.float8_e4m3fn), ["torch.float8_e4m3fn", "16, 32 or 64 bits"]),
        (lambda w: w.to(torch.complex64), ["torch.complex64", "floating-point"]),
    ],
    ids=["nan", "inf", "meta", "int8", "float8", "complex"],
)
@every_case("kind", ["row", "linear_bias"])
def test_base_weight_that_cannot_be_adapted(kind: str, spoil: Callable[..., Any], fragments: list[str]) -> None:
    zoo = LinearZoo(["column", kind])
    weight = nn.Parameter(spoil(getattr(zoo, kind).weight.detach()), requires_grad=False)
    getattr(zoo, kind).weight = weight
    with unchanged(zoo), refuses(ValueError, f"{kind}: ", *fragments):
        dora_fx.DoRA(["column", kind], dim=DIM)(zoo)


def test_output_layer_without_a_weight_anywhere() -> None:
    zoo = LinearZoo(["column", "output_layer"])
    zoo.shared_embedding_or_output_weight = lambda: None
    with unchanged(zoo), refuses(ValueError, "output_layer", "no weight"):
        dora_fx.DoRA(["column", "output_layer"])(zoo)


def test_adapted_again_with_other_settings() -> None:
    model = dora_fx.DoRA(dim=4, alpha=8, dropout=0.1)(tiny_gpt())
    for changed, fragments in (
        (dict(dim=8), ["dim=4", "dim=8"]),
        (dict(alpha=4), ["alpha=8", "alpha=4"]),
        (dict(dropout=0.0), ["dropout=0.1", "dropout=0.0"]),
    ):
        dora = dora_fx.DoRA(**(dict(dim=4, alpha=8, dropout=0.1) | changed))
        with unchanged(model), refuses(ValueError, "decoder.layers.0.self_attention.linear_", *fragments):
            dora(model)


@pytest.mark.parametrize("settings", [None, "eager"])
def test_base_weight_that_requires_grad_again(settings: str | None) -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    zoo.row.weight.requires_grad_(True)
    call = zoo if settings is None else torch.compile(zoo, backend="dora_fx", options={"inner_compiler": settings})
    with unchanged(zoo), refuses(ValueError, "row", "requires grad", "frozen"):
        call({"row": torch.randn(5, IN)})


def test_base_weight_that_requires_grad_after_compilation() -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    call = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "eager"}, fullgraph=True)
    call({"row": torch.randn(5, IN)})
    zoo.row.weight.requires_grad_(True)
    with unchanged(zoo), refuses(Exception, "row", "requires grad", "frozen"):
        call({"row": torch.randn(5, IN)})


@every_case("shape", [(5, IN - 1), (5, 3, 2 * IN), (5, 1)])
@every_case("kind", ["column", "row", "row_split_input", "linear_bias", "output_layer"])
def test_wrong_input_width(kind: str, shape: tuple[int, ...]) -> None:
    zoo = adapt_zoo(LinearZoo([kind]))
    with unchanged(zoo), refuses(ValueError, f"{kind}: ", f"has {shape[-1]} features, the layer takes {IN}"):
        zoo({kind: torch.randn(shape)})


@every_case("factor", ["linear_in", "linear_out"])
@every_case(("change", "found"), [(torch.Tensor.bfloat16, "torch.bfloat16"), (lambda w: w.to("meta"), "meta")])
def test_adapter_of_another_dtype_or_device(factor: str, change: Callable[..., Any], found: str) -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    holder = getattr(zoo.row.adapter, factor)
    holder.weight = nn.Parameter(change(holder.weight.detach()))
    with unchanged(zoo), refuses(ValueError, f"row.adapter.{factor}", found, "torch.float32", "cpu"):
        zoo({"row": torch.randn(5, IN)})


def test_magnitude_on_another_device() -> None:
    zoo = adapt_zoo(LinearZoo(["row"]))
    zoo.row.adapter.weight_magnitude = nn.Parameter(torch.empty(OUT, device="meta"))
    with unchanged(zoo), refuses(ValueError, "row.adapter.weight_magnitude", "meta", "cpu"):
        zoo({"row": torch.randn(5, IN)})


CAST_TENSORS = {
    "adapter.weight_magnitude": [torch.bfloat16, torch.float16, torch.float64],
    "adapter.linear_out.weight": [torch.float16],
    "base_norm_sq": [torch.bfloat16],
    "cached_delta": [torch.float64],
    "adapter.scaling_factor": [torch.bfloat16],
    "adapter.dropout_rescale": [torch.float16],
}


@pytest.mark.parametrize("kind", ["row", "linear_bias"])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_a_tensor_that_was_cast_by_itself_between_two_calls(compiles: bool, kind: str) -> None:
    """As TRL casts what is trainable: an update of a 16-bit magnitude is less than half of its last digit."""
    for name, dtypes in CAST_TENSORS.items():
        for dtype in dtypes:
            zoo = adapt_zoo(LinearZoo([kind]).bfloat16(), dropout=0.25)
            call: Any = torch.compile(zoo, backend="dora_fx", options={"inner_compiler": "eager"}) if compiles else zoo
            inputs = {kind: torch.randn(5, IN, dtype=torch.bfloat16)}
            call(inputs)
            site = getattr(zoo, kind)
            *_, tensor = (t for n, t in (*site.named_parameters(), *site.named_buffers()) if n == name)
            before = tensor.data
            tensor.data = tensor.data.to(dtype)
            path = f"{kind}.{name}".removesuffix(".weight")
            with unchanged(zoo), refuses(ValueError, f"{path}: found {dtype}", "expected"):
                call(inputs)
            tensor.data = before
            call(inputs)


def test_norms_that_were_cast_are_made_anew() -> None:
    zoo, twin = (adapt_zoo(LinearZoo(["row"])) for _ in range(2))
    twin.load_state_dict(zoo.state_dict())
    for buffer in zoo.buffers():
        buffer.data = buffer.data.to(torch.float16)
    dora_fx.invalidate_norms(zoo)
    inputs = {"row": torch.randn(5, IN)}
    assert torch.equal(zoo(inputs)["row"], twin(inputs)["row"])


@every_case("dropout", [0.0, 0.25])
@every_case("shape", [(0, IN), (0, 3, IN), (5, 0, IN)])
def test_empty_batch_gives_empty_output_and_zero_gradients(shape: tuple[int, ...], dropout: float) -> None:
    zoo = adapt_zoo(LinearZoo(), dropout=dropout)
    assert_empty_and_zero(zoo, zoo, shape)


# Every shape and every dropout of the eager table once: how they combine is nothing that a compiler decides.
@pytest.mark.parametrize(("shape", "dropout"), [((0, IN), 0.25), ((0, 3, IN), 0.0), ((5, 0, IN), 0.25)])
def test_a_compiled_empty_batch_gives_empty_output_and_zero_gradients(shape: tuple[int, ...], dropout: float) -> None:
    zoo = adapt_zoo(LinearZoo(), dropout=dropout)
    options = {"inner_compiler": "aot_eager"}
    assert_empty_and_zero(zoo, torch.compile(zoo, backend="dora_fx", options=options, fullgraph=True), shape)


def assert_empty_and_zero(zoo: LinearZoo, call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    inputs = {kind: torch.randn(shape, requires_grad=True) for kind in zoo.kinds}
    outputs = call(inputs)
    assert {output.shape for output in outputs.values()} == {(*shape[:-1], OUT)}
    torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    assert all(x.grad.shape == shape for x in inputs.values())
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trainable(zoo).values())


@every_case(
    ("name", "value"), [("enable_cuda_graph", True), ("external_cuda_graph", True), ("cuda_graph_impl", "local")]
)
def test_cuda_graphs_which_would_keep_the_norms_of_their_first_step(name: str, value: object) -> None:
    model = tiny_gpt()
    setattr(model.config, name, value)
    with unchanged(model), pytest.raises(ValueError, match=f"TransformerConfig.{name}: found {value!r}, expected"):
        dora_fx.DoRA(GPT_TARGETS, dim=DIM)(model)


def test_refused_twice_then_accepted() -> None:
    """The model that a refused call left behind is one that a right call adapts."""
    model = tiny_gpt()
    with refuses(ValueError, "linear_fc3"):
        dora_fx.DoRA([*GPT_TARGETS, "linear_fc3"])(model)
    dora_fx.DoRA(GPT_TARGETS)(model)
    assert len(sites(model)) == 8
