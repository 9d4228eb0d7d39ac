"""DoRA on quantised bases: the function, compiled and eager, PEFT's files, merging, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, PerGroup

import dora_fx
from benchmarks.measuring import peak_bytes
from dora_fx import DoRA, DoRALinear
from dora_fx.checkpoint import CheckpointError
from dora_fx.function import base_norm_squared, whole_of
from dora_fx.function.base_weight import weight_rows
from dora_fx.modules import describe_linear
from tests.closeness import assert_apart, assert_close, relative_error, rounding, roundings_of
from tests.models import randomize_adapters, sites
from tests.oracle import reference_layer
from tests.peft_models import TOKENS, beside_peft, hf_logits, save_peft_adapter
from tests.quantised_models import IN, KINDS, OUT, TwoLayers, four_bit, hqq, nf4_llama, saved_llama, torchao
from tests.tables import every_case

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
X = torch.randn(8, IN, generator=torch.Generator().manual_seed(1))
BOUND = rounding(torch.float32, 2 * (IN + OUT))
# A call of an 8-bit layer without gradients rounds its input to 8 bits.
BOUND_OF_INT8 = 0.05
NAMES = (("linear_in.weight", "lora_a"), ("linear_out.weight", "lora_b"), ("weight_magnitude", "magnitude"))


def adapted(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    model = DoRA(["up", "down"], dim=4, alpha=8, **settings)(TwoLayers(kind, dtype))
    randomize_adapters(model)
    return model


def results(model: nn.Module, call: Callable[..., Any], x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    """Output, and gradients of x and of every adapter's parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = call(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def expected(model: Any, x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    """What `results` gives of the same function in float64, on dequantised weights."""
    layers = {name: reference_layer(site) for name, site in sites(model).items()}
    leaves = {
        f"{name}.adapter.{ours}": getattr(layer, theirs) for name, layer in layers.items() for ours, theirs in NAMES
    }
    x = x.double().requires_grad_()
    torch.manual_seed(7)
    y = x + layers["down"](torch.sin(layers["up"](x)))
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}


@every_case("kind", ["nf4 double", "int8", "hqq 4", "torchao intx int4"])
def test_the_function_and_its_gradients(kind: str) -> None:
    check_function(kind, ("dora_fx", {"inner_compiler": "eager"}))


@pytest.mark.slow
@every_case("kind", KINDS)
def test_the_function_of_every_kind(kind: str) -> None:
    check_function(kind, ("dora_fx", {"inner_compiler": "aot_eager"}), ("aot_eager", None))


def check_function(kind: str, *compilers: tuple[str, dict[str, str] | None]) -> None:
    """Eager and compiled, in one graph each for training and evaluation, whatever came between."""
    for dropout in (0.0, 0.25):
        model = adapted(kind, dropout=dropout)
        exact = expected(model)
        assert_close(results(model, model), exact, BOUND)
        for backend, options in compilers:
            torch._dynamo.reset()
            counters.clear()
            compiled = torch.compile(model.train(), backend=backend, fullgraph=True, options=options)
            assert_close(results(model, compiled), exact, BOUND)
            if dropout:
                continue
            with torch.no_grad():
                evaluated = compiled.eval()(X)
            assert relative_error(evaluated, exact["y"]) < (BOUND_OF_INT8 if kind == "int8" else BOUND)
            assert_close(results(model, compiled.train()), exact, BOUND)
            assert counters["stats"]["unique_graphs"] == 2
            assert not counters["dora_fx"]["sites_unmatched"]
            with torch.no_grad():
                # Of other parameters, which the graph has to read.
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.25)
            exact = expected(model)
            assert_close(results(model, compiled), exact, BOUND)


@pytest.mark.slow
@every_case("kind", ["nf4 double", "int8", "torchao intx int4", "torchao float8"])
def test_inductor_compiles_it_too(kind: str) -> None:
    model = adapted(kind)
    compiled = torch.compile(model, backend="dora_fx", fullgraph=True)
    assert_close(results(model, compiled), expected(model), BOUND)


def test_a_compiled_model_is_checked_and_trains(tmp_path: Path) -> None:
    """One graph for all layers, and gradients pass through checkpoints of them."""
    model = llama(saved_llama(tmp_path / "base"))
    batch = {"input_ids": TOKENS, "labels": TOKENS}

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train().gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        model(**batch, use_cache=False).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    model.train()
    eager = gradients(False)
    assert_close(gradients(True), eager, 0.0)
    counters.clear()
    dora_fx.compile_model(model, inner_compiler="eager", fullgraph=True)
    assert_close(gradients(False), eager, rounding(torch.float32, 4 * roundings_of(dense_llama(tmp_path / "base"))))
    assert counters["dora_fx"]["graphs_compiled"] == 1 and not counters["dora_fx"]["sites_unmatched"]
    optimizer = torch.optim.AdamW(dora_fx.parameter_groups(model, lr=1e-3))
    report = dora_fx.check(model, batch, optimizer)
    assert not report.failed, str(report)


SIXTEEN_BITS = rounding(torch.bfloat16, 16)


@every_case("kind", ["nf4 double", "fp4", "torchao intx int4", "torchao float8"])
def test_16_bits(kind: str) -> None:
    model = adapted(kind, torch.bfloat16)
    site = model.up
    assert site.adapter.linear_in.weight.dtype == torch.bfloat16 and site.base_norm_sq.dtype == torch.float32
    assert_close(results(model, model, X.bfloat16()), expected(model, X.bfloat16()), SIXTEEN_BITS)


@every_case("kind", ["nf4 double", "fp4"])
def test_16_bits_and_an_input_of_another_dtype(kind: str) -> None:
    """As of norms that were cast to float32; bitsandbytes' layers return it in that."""
    model = adapted(kind, torch.bfloat16)
    assert model.up(X).dtype == torch.float32
    assert_close(model.up(X), model.up(X.bfloat16()).float(), SIXTEEN_BITS)


@every_case("kind", [kind for kind in KINDS if not kind.startswith("torchao")])
@every_case("shape", [(96, 64), (37, 130), (128, 192)])
def test_rows_alone_are_bitwise_those_of_the_whole(kind: str, shape: tuple[int, int]) -> None:
    """Also where a block of elements begins in one row and ends in another."""
    if shape[0] * shape[1] % 4 and "bfloat16" in kind:
        pytest.skip("an element of bfloat16 stores four of the weight")
    if shape[1] % 32 and kind.startswith("hqq"):
        pytest.skip("HQQ's groups are of 32 elements of a row")
    layer: Any = KINDS[kind](nn.Linear(shape[1], shape[0]).requires_grad_(False))
    weight = describe_linear("layer", layer).weight
    if kind == "int8":
        whole = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    elif kind.startswith("hqq"):
        whole = layer.dequantize()
    else:
        whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(whole_of(weight), whole)
    for rows in (slice(0, 1), slice(5, 23), slice(shape[0] - 3, shape[0])):
        assert torch.equal(weight_rows(weight, rows), whole[rows])


def test_norms_dequantise_32_mib_at_a_time() -> None:
    """At most, of a weight of 64 MiB in float32, with what is made on the way."""
    layer = four_bit("nf4", nested=True)(nn.Linear(2048, 8192, bias=False).requires_grad_(False))
    site = DoRA(["0"], dim=4, alpha=8)(nn.Sequential(layer))[0]
    site.invalidate_norm()
    # Rows of 16 MiB at once, as each element is counted twice.
    assert 16 * 2**20 <= peak_bytes(site._get_weight_norm, "cpu") <= 32 * 2**20
    weight = whole_of(site.base_weight)
    assert_close(base_norm_squared(site.base_weight), weight.double().square().sum(1), rounding(torch.float32, 2048))


def test_a_write_into_the_scales_is_noticed() -> None:
    """The packed elements stay; the norms follow from both."""
    model = adapted("nf4")
    before = results(model, model)["y"]
    model.up.to_wrap.weight.quant_state.absmax.mul_(2.0)
    found = results(model, model)
    assert_apart(found["y"], before)
    assert_close(found, expected(model), BOUND)


def test_a_weight_that_an_evaluation_repacked_is_refused() -> None:
    model = TwoLayers("nf4")
    if not model.up.support_avx512bf16_for_cpu:
        # What bitsandbytes does on a CPU that has these instructions.
        model.up.weight.quant_state.packing_format_for_cpu = True
    with torch.no_grad():
        model.eval()(X)
    with pytest.raises(ValueError, match=r"^up: found a weight that an evaluation repacked in place for AVX512-BF16"):
        DoRA(["up"], dim=4, alpha=8)(model)
    # A layer that is not adapted would give no gradient to those before it.
    with pytest.raises(ValueError, match=r"^up: found a weight that an evaluation repacked"):
        DoRA(["own"], dim=4, alpha=8)(nn.ModuleDict({"own": nn.Linear(IN, IN), "up": model.up}))


def test_layers_that_are_not_adapted_pass_gradients_on_after_an_evaluation() -> None:
    model: Any = TwoLayers("nf4")
    # As bitsandbytes sets it on a CPU that has these instructions.
    model.down.support_avx512bf16_for_cpu = True
    DoRA(["up"], dim=4, alpha=8)(model)
    assert not model.down.support_avx512bf16_for_cpu
    before = results(model, model)
    model.eval()
    with torch.no_grad(), dora_fx.disable_adapter(model):
        model(X)
    assert_close(results(model, model.train()), before, 0.0)


class _Other(nn.Linear):
    pass


def _other(module: str, name: str) -> nn.Module:
    """A layer of a class that looks like one of another package's."""
    return type(name, (_Other,), {"__module__": module})(IN, OUT)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not yet": (lambda: bnb.nn.Linear4bit(IN, OUT), "0: found a Linear4bit whose weight is not quantised yet"),
    "not yet 8": (
        lambda: bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False),
        "0: found a Linear8bitLt whose weight is not quantised yet",
    ),
    "float16 in 8": (lambda: bnb.nn.Linear8bitLt(IN, OUT), "0: found a Linear8bitLt with has_fp16_weights=True"),
    "input too": (
        lambda: torchao(Int8DynamicActivationInt8WeightConfig)(nn.Linear(IN, OUT).requires_grad_(False)),
        "0: found a base weight of torchao's class Int8Tensor that has its input quantised as well",
    ),
    "gptq": (lambda: _other("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear"), "0: found a TorchQuantLinear"),
    "hqq of 3": (lambda: hqq(3)(nn.Linear(IN, OUT)), "0: found an HQQLinear with packing = '3bit_32', expected one of"),
    "awq": (lambda: _other("awq.modules.linear.gemm", "WQLinear_GEMM"), "0: found a WQLinear_GEMM: AWQ layers"),
    "fp8": (
        lambda: _other("transformers.integrations.finegrained_fp8", "FP8Linear"),
        "0: found a FP8Linear: quantised layers of transformers' own are not supported",
    ),
    "wrong kernel": (
        lambda: four_bit("nf4", nested=False)(nn.Linear(48, 80).requires_grad_(False)),
        "0: found a Linear4bit whose outputs are off W0 x",
    ),
}


@every_case("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    model = nn.Sequential(make())
    with pytest.raises((ValueError, TypeError), match=message):
        DoRA(["0"], dim=4, alpha=8)(model)
    assert not any(isinstance(module, DoRALinear) for module in model.modules())


def llama(folder: Path, *targets: str, **settings: Any) -> Any:
    model = DoRA(list(targets) or TARGETS, dim=4, alpha=12)(nf4_llama(folder, **settings))
    randomize_adapters(model)
    return model


def test_loss_and_gradients_are_those_of_peft(tmp_path: Path) -> None:
    """And files load in PEFT on the same quantised base, with equal logits, and PEFT's load here."""
    folder = saved_llama(tmp_path / "base")
    model = llama(folder)
    dora_fx.export_hf(model, tmp_path / "adapter", base_model=str(folder))
    theirs = peft.PeftModel.from_pretrained(nf4_llama(folder).train(), tmp_path / "adapter", is_trainable=True)
    bound = rounding(torch.float32, 2 * roundings_of(dense_llama(folder)))
    assert_close(*beside_peft(model, theirs), bound)
    assert_close(hf_logits(model), hf_logits(never_repacked(theirs)), bound)
    own = save_peft_adapter(nf4_llama(folder).train(), tmp_path / "theirs", target_modules=TARGETS)
    imported = dora_fx.import_hf(nf4_llama(folder), tmp_path / "theirs")
    assert_close(hf_logits(imported), hf_logits(never_repacked(own)), bound)
    assert_apart(hf_logits(imported), hf_logits(model))


def never_repacked(model: nn.Module) -> nn.Module:
    """The model, whose evaluations leave its weights alone; PEFT's repack them on some processors, ours do not."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


def dense_llama(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_weights_of_torchao_in_a_transformers_model(tmp_path: Path) -> None:
    """Files, checkpoints, and merging after a compilation, which knows the weights."""
    folder = saved_llama(tmp_path / "base")

    def load() -> Any:
        settings = transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )

    model = DoRA(TARGETS, dim=4, alpha=12)(load())
    randomize_adapters(model)
    logits = hf_logits(model)
    dora_fx.export_hf(model, tmp_path / "adapter", base_model=str(folder))
    assert torch.equal(hf_logits(dora_fx.import_hf(load(), tmp_path / "adapter")), logits)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint")
    again = DoRA(TARGETS, dim=4, alpha=12)(load())
    dora_fx.load_checkpoint(again, tmp_path / "checkpoint")
    assert torch.equal(hf_logits(again), logits)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        dora_fx.load_checkpoint(DoRA(TARGETS, dim=4, alpha=12)(nf4_llama(folder)), tmp_path / "checkpoint")
    compiled = torch.compile(model, backend="dora_fx", options={"inner_compiler": "eager"})
    bound = rounding(torch.float32, 2 * roundings_of(dense_llama(folder)))
    assert_close(hf_logits(compiled), logits, bound)
    with dora_fx.merged(model):
        assert_close(hf_logits(model), logits, bound)
    assert torch.equal(hf_logits(model), logits)


def test_merging(tmp_path: Path) -> None:
    """Merged layers are dense, streams and files too, and afterwards the quantised weights are as they were."""
    folder = saved_llama(tmp_path / "base")
    model = llama(folder).eval()
    layer = model.model.layers[0].mlp.up_proj
    packed, logits = layer.to_wrap.weight.data.clone(), hf_logits(model)
    bound = rounding(torch.float32, 2 * roundings_of(dense_llama(folder)))
    streamed = dict(dora_fx.iter_merged(model))
    with dora_fx.merged(model):
        merged = model.model.layers[0].mlp.up_proj
        assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
        assert_close(hf_logits(model), logits, bound)
        assert {name: value.shape for name, value in streamed.items()} == {
            name: value.shape for name, value in model.state_dict().items()
        }
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in streamed.items())
        model.save_pretrained(tmp_path / "merged")
    assert model.model.layers[0].mlp.up_proj is layer and torch.equal(layer.to_wrap.weight.data, packed)
    assert torch.equal(hf_logits(model), logits)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert not getattr(loaded, "is_quantized", False)
    assert_close(hf_logits(loaded), logits, bound)
    comparison = dora_fx.compare_merged(model, TOKENS, dtype=torch.bfloat16)
    assert len(comparison.layers) == 2 * len(TARGETS) and all(0.0 < gap.lost < 0.1 for gap in comparison.layers)
    dora_fx.merge(model)
    assert_close(hf_logits(model), logits, bound)


def test_a_model_that_is_merged_in_part_is_not_saved(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "base")
    model = llama(folder, "up_proj")
    streamed = dict(dora_fx.iter_merged(model))
    assert not any(value.dtype == torch.uint8 for value in streamed.values())
    with pytest.raises(ValueError, match=r"found model.layers.0.self_attn.q_proj quantised beside layers that are"):
        dora_fx.merge(model).save_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "merged", state_dict=streamed)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    bound = rounding(torch.float32, 2 * roundings_of(loaded))
    assert_close(hf_logits(loaded), hf_logits(model), bound)


def test_checkpoints_know_their_quantised_base(tmp_path: Path) -> None:
    folder = saved_llama(tmp_path / "base")
    model = llama(folder)
    dora_fx.save_checkpoint(model, tmp_path / "checkpoint")
    again = DoRA(TARGETS, dim=4, alpha=12)(nf4_llama(folder))
    dora_fx.load_checkpoint(again, tmp_path / "checkpoint")
    assert torch.equal(hf_logits(again), hf_logits(model))
    for other in (nf4_llama(folder, bnb_4bit_quant_type="fp4"), dense_llama(folder)):
        with pytest.raises(CheckpointError, match="was trained on another base model"):
            dora_fx.load_checkpoint(DoRA(TARGETS, dim=4, alpha=12)(other), tmp_path / "checkpoint")


def test_several_adapters(tmp_path: Path) -> None:
    """A second adapter, its own function, and the first one bitwise afterwards."""
    model = llama(saved_llama(tmp_path / "base")).eval()
    first = hf_logits(model)
    dora_fx.add_adapter(model, "second", DoRA(TARGETS, dim=8, alpha=8))
    dora_fx.set_adapter(model, "second")
    randomize_adapters(model, seed=5)
    assert_apart(hf_logits(model), first)
    dora_fx.set_adapter(model, "default")
    assert torch.equal(hf_logits(model), first)


def test_layers_in_formats_that_cannot_be_read_may_be_left_alone() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(64, 32), "others": bnb.nn.Linear4bit(64, 32)})
    dora = DoRA(["plain"], dim=4)
    dora(model)
    assert dora.report is not None and len(dora.report.sites) == 1
    with pytest.raises(ValueError, match=r"^others: found a Linear4bit whose weight is not quantised yet"):
        DoRA(["others"], dim=4)(model)
