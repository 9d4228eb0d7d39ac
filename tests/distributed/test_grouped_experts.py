"""Grouped layers of experts at every topology, with emulated kernels, compared with the oracle expert by expert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters

import dora_fx
from dora_fx.experts_compilation import compile_experts, moe_layers
from dora_fx.megatron.cpu_runtime import cuda_means_cpu
from tests.closeness import assert_apart, assert_below, assert_close, relative_error, rounding
from tests.distributed import grouped_experts as grouped
from tests.distributed import moe_layers as sequential
from tests.distributed.launch import run_layout
from tests.distributed.moe_layers import (
    COMPILED,
    DIM,
    EXPERTS,
    FEATURES,
    FFN,
    HIDDEN,
    MODES,
    ROUNDINGS,
    SCALING,
    TRAINED,
    ExpertLayout,
    Results,
    TensorsOf,
    batch,
    bound_of_step,
    oracle_step,
    own_tokens,
    step,
)
from tests.distributed.moe_training import Mode, Training
from tests.distributed.test_checkpoint_reshaping import whole_tensors
from tests.distributed.test_experts import assert_trained
from tests.distributed.zoo import whole_values
from tests.reference import dora_linear

pytestmark = pytest.mark.usefixtures("emulated_te")

slow = pytest.mark.slow
LAYOUTS = [
    ExpertLayout(),
    ExpertLayout(2, ep=2),
    ExpertLayout(2, tp=2, etp=2),
    pytest.param(ExpertLayout(2, tp=2, ep=2), marks=slow),
    pytest.param(ExpertLayout(2, tp=2), marks=slow),
    pytest.param(ExpertLayout(4, tp=2, ep=2, etp=2), marks=slow),
    pytest.param(ExpertLayout(2, etp=2), marks=slow),
    pytest.param(ExpertLayout(2, ep=2, dispatcher="alltoall"), marks=slow),
    pytest.param(ExpertLayout(2, tp=2, ep=2, dispatcher="alltoall"), marks=slow),
]


def run(layout: ExpertLayout) -> dict[str, Any]:
    """On every rank: what attaching makes, and two batches of each mode; the second leaves experts without tokens."""
    model = grouped.build(layout)
    x = own_tokens(batch(0), layout)
    base = model(x)
    grouped.adapted(model, set_values=False)
    assert torch.equal(model(x), base)
    initial = grouped.tensors_of_experts(model)
    alike = sequential.adapted(grouped.build_sequential(layout), set_values=False)
    found = {"initial": initial, "initial of sequential experts": sequential.tensors_of_sites(alike)}
    return {**found, "steps": {mode: run_mode(layout, *mode) for mode in MODES}}


def run_mode(layout: ExpertLayout, compiler: str, dtype: torch.dtype) -> list[Results]:
    torch._dynamo.reset()
    model = grouped.adapted(grouped.build(layout, dtype))
    counters.clear()
    if compiler == "compiled":
        compile_experts(moe_layers(model.modules()), COMPILED)
    steps = [step(model, layout, number, dtype, grouped.tensors_of_experts) for number in range(2)]
    # One for each of the two layers.
    assert counters["dora_fx"]["graphs_compiled"] == (2 if compiler == "compiled" else 0)
    return steps


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_topology_computes_the_function_of_one_rank_emulated_kernels(layout: ExpertLayout) -> None:
    found = run_layout(run, layout)
    expected = [oracle_step(number, num_shared=0) for number in range(2)]
    for (_, dtype), steps in found["steps"].items():
        for number, result in enumerate(steps):
            assert_close(result, expected[number], bound_of_step(dtype))
    # By their numbers, experts start with the factors that they have as layers of their own.
    for name, value in found["initial of sequential experts"].items():
        bound = rounding(torch.float64, ROUNDINGS) if name.endswith("magnitude") else 0.0
        assert_close(found["initial"][name], value, bound)


def drop(layout: ExpertLayout) -> dict[str, Results]:
    """A batch under dropout, eager and compiled, and in evaluation."""
    found = {}
    for compiler in ("eager", "compiled"):
        torch._dynamo.reset()
        model = grouped.adapted(grouped.build(layout), dropout=0.3)
        if compiler == "compiled":
            compile_experts(moe_layers(model.modules()), COMPILED)
        torch.manual_seed(12)
        found[compiler] = step(model, layout, 0, torch.float64, grouped.tensors_of_experts)
    found["evaluation"] = step(model.eval(), layout, 0, torch.float64, grouped.tensors_of_experts)
    return found


def test_dropout_is_the_same_on_ranks_that_share_experts_emulated_kernels() -> None:
    """What it computes is compared with the paper's formula in tests/unit/test_grouped_function.py."""
    bound = rounding(torch.float64, ROUNDINGS)
    one_rank, two_ranks = (run_layout(drop, layout) for layout in (ExpertLayout(), ExpertLayout(2, tp=2, etp=2)))
    for found in (one_rank, two_ranks):
        assert_close(found["evaluation"], oracle_step(0, num_shared=0), bound)
        for compiler in ("eager", "compiled"):
            assert_close(found[compiler], one_rank["eager"], bound)
    assert_apart(one_rank["eager"]["y"], one_rank["evaluation"]["y"])


# Builds a layer, adapts it, and reads its adapters.
FORMS: dict[str, tuple[Any, Any, TensorsOf]] = {
    "grouped": (grouped.build, grouped.adapted, grouped.tensors_of_experts),
    "sequential": (grouped.build_sequential, sequential.adapted, sequential.tensors_of_sites),
}


def adapted(form: str, layout: ExpertLayout, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    build, adapt, _ = FORMS[form]
    return adapt(build(layout, dtype), **settings)


def save(layout: ExpertLayout, folder: Path) -> None:
    for form in FORMS:
        dora_fx.save_checkpoint(adapted(form, layout), folder / f"{form} {layout}")


def load_and_save_again(layout: ExpertLayout, folder: Path, sources: list[str]) -> None:
    """Load every checkpoint into both forms, whose adapters are the initial ones, and save what they then are."""
    for form in FORMS:
        for source in sources:
            model = adapted(form, layout, set_values=False)
            dora_fx.load_checkpoint(model, folder / source)
            dora_fx.save_checkpoint(model, folder / f"{form} {layout} of {source}")


def test_checkpoints_of_grouped_and_sequential_experts_are_the_same_emulated_kernels(tmp_path: Path) -> None:
    layouts = [ExpertLayout(), ExpertLayout(2, ep=2), ExpertLayout(2, tp=2, etp=2)]
    for layout in layouts:
        run_layout(save, layout, tmp_path)
    sources = [f"{form} {layout}" for form in FORMS for layout in layouts]
    expected = whole_tensors(tmp_path / "sequential 1")
    assert expected["mlp.experts.experts.linear_fc1.adapter.linear_out.weight"].shape == (EXPERTS, 2 * FFN, DIM)
    for layout in layouts:
        run_layout(load_and_save_again, layout, tmp_path, sources)
    checkpoints = list(tmp_path.iterdir())
    assert len(checkpoints) == len(sources) * (1 + len(FORMS) * len(layouts))
    for checkpoint in checkpoints:
        found = whole_tensors(checkpoint)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), checkpoint.name


def train(layout: ExpertLayout, mode: Mode) -> Results:
    model = adapted("grouped", layout, mode.dtype)
    compile_experts(moe_layers(model.modules()), COMPILED)
    return Training(layout, mode, model, grouped.tensors_of_experts).results()


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        (ExpertLayout(2, ep=2), Mode(overlap=True)),
        (ExpertLayout(2, tp=2, etp=2), Mode()),
        # Megatron's distributed optimizer refuses float64.
        pytest.param(ExpertLayout(2), Mode(torch.float32, distributed=True), marks=slow),
        pytest.param(ExpertLayout(2, tp=2), Mode(), marks=slow),
        pytest.param(ExpertLayout(2, tp=2, ep=2), Mode(), marks=slow),
        pytest.param(ExpertLayout(4, tp=2, ep=2, etp=2), Mode(torch.float32, distributed=True), marks=slow),
        pytest.param(ExpertLayout(4, tp=2, etp=2), Mode(overlap=True), marks=slow),
        pytest.param(ExpertLayout(2, etp=2), Mode(), marks=slow),
        pytest.param(ExpertLayout(2, etp=2), Mode(torch.float32, distributed=True), marks=slow),
    ],
    ids=str,
)
def test_trained_under_megatrons_data_parallelism_emulated_kernels(layout: ExpertLayout, mode: Mode) -> None:
    # Megatron has the gradient's norm in float32.
    assert_trained(run_layout(train, layout, mode), mode, 1e-6, num_shared=0)


def routings(layout: ExpertLayout) -> list[int]:
    """Graphs after each of 20 batches of four lengths: experts, and ranks, without tokens too."""
    torch._dynamo.reset()
    counters.clear()
    model = grouped.adapted(grouped.build(layout))
    compile_experts(moe_layers(model.modules()), COMPILED)
    graphs, generator = [], torch.Generator().manual_seed(0)
    for number in range(20):
        x = torch.randn([8, 5, 12, 1][number % 4], 2, HIDDEN, generator=generator, dtype=torch.float64)
        x = x[:1, :1].expand_as(x).clone() if number % 3 == 2 else x
        model(x.requires_grad_()).square().sum().backward()
        graphs.append(counters["dora_fx"]["graphs_compiled"])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, graphs)
    return [max(at_once) for at_once in zip(*everyone, strict=True)]


def test_other_routings_compile_nothing_anew_emulated_kernels() -> None:
    """One graph for each kind of layer."""
    graphs = run_layout(routings, ExpertLayout(2, ep=2))
    assert graphs[-1] == len(FEATURES), graphs


VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"add_bias_linear": True},
    "probabilities on inputs": {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
}


def variant_errors() -> dict[str, float]:
    """Output and gradients of layers with biases, and with probabilities in front of the experts, by the formula."""
    errors = {}
    for name, settings in VARIANTS.items():
        model = grouped.build(ExpertLayout(), **settings)
        for index, linear in enumerate(grouped.grouped_linears(model).values()):
            for key, parameter in linear.named_parameters():
                if key.startswith("bias"):
                    parameter.data.copy_(whole_values(tuple(parameter.shape), f"{index} {key}", 0.5))
        grouped.adapted(model)
        for compiled in (False, True):
            if compiled:
                compile_experts(moe_layers(model.modules()), COMPILED)
            found, expected = (variant_step(model, forward) for forward in (model, by_formula))
            errors |= {
                f"{name} {'compiled' * compiled} {key}": relative_error(found[key], value)
                for key, value in expected.items()
            }
    return errors


def variant_step(model: Any, forward: Any) -> Results:
    x = batch(0).reshape(-1, 1, HIDDEN).requires_grad_()
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    y = forward(x) if forward is model else forward(model, x)
    gradients = torch.autograd.grad((y * batch(0, "loss").reshape(y.shape)).sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["dx", *parameters], gradients, strict=True))}


def by_formula(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer expert by expert, biased as Megatron's SequentialMLP is, with DoRA as the paper writes it."""
    config, tokens = model.config, x.reshape(-1, HIDDEN)
    bias = getattr(model.mlp.router, "bias", None)
    logits = tokens @ model.mlp.router.weight.T + (0.0 if bias is None else bias)
    if config.moe_router_pre_softmax:
        values, chosen = logits.softmax(-1, dtype=torch.float32).to(x.dtype).topk(config.moe_router_topk, -1)
    else:
        values, chosen = logits.topk(config.moe_router_topk, -1)
        values = values.softmax(-1, dtype=torch.float32).to(x.dtype)
    y = torch.zeros_like(tokens)
    for number in range(EXPERTS):
        token, slot = (chosen == number).nonzero(as_tuple=True)
        own, probs = tokens[token], values[token, slot][:, None]
        inside = config.moe_apply_probs_on_input
        hidden = expert_linear(model, "linear_fc1", number, own * probs if inside else own, 1.0)
        gate, up = hidden.chunk(2, -1)
        activated = F.silu(gate) * up * (1.0 if inside else probs)
        y = y.index_add(0, token, expert_linear(model, "linear_fc2", number, activated, 1.0 if inside else probs))
    return y.view_as(x)


def expert_linear(model: Any, name: str, number: int, x: torch.Tensor, of_bias: torch.Tensor | float) -> torch.Tensor:
    site = grouped.grouped_linears(model)[name]
    trained = [grouped.of_experts(tensor, site)[number] for tensor in grouped.adapter_tensors(site).values()]
    weight = site.to_wrap.get_parameter(f"weight{number}")
    y = dora_linear(x, weight, None, *trained, scaling=SCALING)
    return y + site.to_wrap.get_parameter(f"bias{number}") * of_bias if site.to_wrap.use_bias else y


def test_biases_and_probabilities_emulated_kernels() -> None:
    assert_below(run_layout(_on_one_rank, ExpertLayout(), variant_errors), rounding(torch.float64, ROUNDINGS))


def _on_one_rank(layout: ExpertLayout, function: Any) -> Any:
    return function()


def refusals() -> dict[str, str]:
    """What attaching says of layers and settings under which another function would be trained."""
    found = {}
    for name in ("single_grouped_weight", "use_transformer_engine_op_fuser"):
        model = grouped.build(ExpertLayout())
        setattr(model.config, f"moe_{name}" if name.startswith("single") else name, True)
        found[name] = _message(model)
    for name in ("overlap_dispatch_backward_with_experts_wgrad", "moe_paged_stash"):
        model = grouped.build(ExpertLayout())
        object.__setattr__(model.config, name, True)
        found[name] = _message(model)
    model = grouped.build(ExpertLayout())
    linear = grouped.grouped_linears(model)["linear_fc2"]
    linear.weight2.data[3, 4] = torch.nan
    found["not finite"] = _message(model)
    model = grouped.build(ExpertLayout())
    linear = grouped.grouped_linears(model)["linear_fc1"]
    forward = type(linear).forward
    linear.forward = lambda x, m_splits: (2.0 * forward(linear, x, m_splits)[0], None)
    found["another function"] = _message(model)
    model = grouped.adapted(grouped.build(ExpertLayout()))
    site = grouped.grouped_linears(model)["linear_fc1"]
    for name, call in {
        "too few counts": lambda: site(torch.zeros(4, HIDDEN, dtype=torch.float64), [2, 2]),
        "other counts": lambda: site(torch.zeros(4, HIDDEN, dtype=torch.float64), [2, 2, 1, 0]),
        "features": lambda: site(torch.zeros(4, HIDDEN + 1, dtype=torch.float64), [2, 2, 0, 0]),
    }.items():
        found[name] = _raised(call)
    site.to_wrap.weight3.requires_grad_()
    found["trained base"] = _raised(lambda: site(torch.zeros(4, HIDDEN, dtype=torch.float64), [4, 0, 0, 0]))
    return found


def _message(model: Any) -> str:
    before = {name: value.clone() for name, value in model.named_parameters()}
    message = _raised(lambda: grouped.adapted(model))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    return message


def _raised(call: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    return str(error.value)


def test_what_is_refused_is_named_emulated_kernels() -> None:
    found = run_layout(_on_one_rank, ExpertLayout(), refusals)
    layer = "mlp.experts.linear_fc1: found "
    kind = "a TEColumnParallelGroupedLinear "
    expected = {
        "single_grouped_weight": f"{layer}{kind}with moe_single_grouped_weight = True, expected False",
        "use_transformer_engine_op_fuser": f"{layer}{kind}with use_transformer_engine_op_fuser = True, expected False",
        "overlap_dispatch_backward_with_experts_wgrad": f"{layer}{kind}with overlap_dispatch_backward_with_experts_wg",
        "moe_paged_stash": f"{layer}{kind}with moe_paged_stash = True, expected False",
        "not finite": "mlp.experts.linear_fc2.weight2: the base weight has NaN or inf in 1 of 16 rows",
        "another function": f"{layer}{kind}whose outputs are off W0 x + bias by up to",
        "too few counts": f"{layer}2 numbers of tokens, expected one for each of 4",
        "other counts": f"{layer}4 tokens, expected the sum of the experts' numbers, 5",
        "features": "mlp.experts.linear_fc1: the input has 17 features, the layer takes 16",
        "trained base": "mlp.experts.linear_fc1: the base weight requires grad",
    }
    assert found.keys() == expected.keys()
    assert {name: message[: len(expected[name])] for name, message in found.items()} == expected


LENGTHS = [6, 9, 4, 12]


def compiled_gpt(layout: ExpertLayout, settings: dict[str, Any]) -> dict[str, Any]:
    """How far 20 compiled batches are from eager ones, and the graphs of grouped layers after them."""
    torch._dynamo.reset()
    eager, compiled = grouped.gpt(layout), grouped.gpt(layout, **settings)
    compiled.load_state_dict(eager.state_dict())
    dora_fx.compile_model(compiled, inner_compiler="aot_eager")
    errors, graphs = {}, []
    counters.clear()
    for number in range(20):
        length = LENGTHS[number % len(LENGTHS)]
        expected, found = (grouped.gpt_step(model, number, length) for model in (eager, compiled))
        errors[f"batch {number}"] = max(relative_error(found[name], value) for name, value in expected.items())
        graphs.append(counters["dora_fx"]["graphs_compiled"])
    return {"errors": errors, "graphs": graphs}


RECOMPUTED = [
    {},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
]


@slow
@pytest.mark.parametrize("settings", RECOMPUTED, ids=str)
def test_compiled_models_emulated_kernels(settings: dict[str, Any]) -> None:
    found = run_layout(compiled_gpt, ExpertLayout(2, ep=2), settings)
    assert_below(found["errors"], rounding(torch.float32, 4 * ROUNDINGS))
    assert found["graphs"][-1] == found["graphs"][4] > 0, found["graphs"]


def in_training(form: str, layout: ExpertLayout, distributed: bool) -> Training:
    """A layer in training after two steps."""
    mode = Mode(torch.float32, distributed=distributed)
    training = Training(layout, mode, adapted(form, layout, mode.dtype), FORMS[form][-1])
    for number in range(2):
        training.step(number)
    return training


def save_trained(layout: ExpertLayout, folder: Path, distributed: bool) -> None:
    for form in FORMS:
        training = in_training(form, layout, distributed)
        with cuda_means_cpu():
            dora_fx.save_checkpoint([training.ddp], folder / form, training.optimizer)


def load_trained(layout: ExpertLayout, folder: Path, distributed: bool) -> None:
    for form in FORMS:
        training = in_training(form, layout, distributed)
        for source in FORMS:
            with cuda_means_cpu():
                dora_fx.load_checkpoint([training.ddp], folder / source, training.optimizer)
                dora_fx.save_checkpoint([training.ddp], folder / f"{form} of {source}", training.optimizer)


@pytest.mark.parametrize("distributed", [False, pytest.param(True, marks=slow)])
def test_state_of_megatrons_optimizers_is_the_same_emulated_kernels(distributed: bool, tmp_path: Path) -> None:
    run_layout(save_trained, ExpertLayout(2, ep=2), tmp_path, distributed)
    run_layout(load_trained, ExpertLayout(2, tp=2, etp=2), tmp_path, distributed)
    for source in FORMS:
        expected = whole_tensors(tmp_path / source)
        state = Counter(key.split(".")[2] for key in expected if key.startswith("optimizer.state."))
        # Of each tensor of all experts' layers; the distributed optimizer has main copies too.
        kinds = ["exp_avg", "exp_avg_sq", *(["param"] if distributed else [])]
        assert state == dict.fromkeys(kinds, len(TRAINED) * len(FEATURES))
        for form in FORMS:
            found = whole_tensors(tmp_path / f"{form} of {source}")
            assert found.keys() == expected.keys()
            different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
            assert not different, f"{form} of {source}: {different}"
