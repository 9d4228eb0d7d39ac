"""`dora_fx.explain` and `dora-fx explain`: what they refuse, what they add up, and models under FakeTensorMode."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dora_fx
from dora_fx.app.cli.explain import bytes_in
from dora_fx.app.cli.explained_tables import explanation_tables, text_of
from dora_fx.app.cli.main import main
from dora_fx.app.errors import UserError
from dora_fx.app.options import LAYOUT_OPTIONS
from dora_fx.explanation import (
    VARIANTS,
    Explanation,
    PlannedRun,
    TensorFacts,
    captured_layers,
    describe_layer,
    explain,
)
from dora_fx.explanation.named_shapes import architecture_named
from dora_fx.function import scale_rows
from dora_fx.models import HF_ARCHITECTURES, Experts, GPTArchitecture, empty_gpt_model
from dora_fx.modules import dora_linear
from tests.models import DIM, LinearZoo, adapt_zoo, sites
from tests.tables import every_case

TINY = GPTArchitecture(
    hf=HF_ARCHITECTURES["qwen2"],
    num_layers=6,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=64,
    max_sequence_length=64,
    layernorm_epsilon=1e-5,
    attention_dropout=0.0,
    tied_embeddings=True,
    rotary_base=10000.0,
)
MOE = dataclasses.replace(TINY, hf=HF_ARCHITECTURES["qwen3_moe"], num_layers=2, experts=Experts(4, 2, True))
RUN = PlannedRun(tp=2, pp=3, dp=2, sequence_parallel=True, sequence_length=16, dim=4, gradient_accumulation=8)


@pytest.fixture(scope="module")
def tiny() -> Explanation:
    return explain(TINY, RUN)


@every_case(
    ("base", "options", "message"),
    [
        ("llama3-71b", {}, "base: found 'llama3-71b', which is neither a file nor a name; expected .*llama3-70b"),
        ("llama3-8b", {"tp": 3}, "tp: found 3, expected a divisor of the 14336 features of the MLP"),
        ("llama3-8b", {"target_modules": "linear_qkv"}, "target_modules: found 'linear_qkv', expected a list of names"),
        ("llama3-8b", {"recompute": "no"}, "recompute: found 'no', expected True or False"),
        ("llama3-8b", {"pp": 5}, "pp: found 5, expected a divisor of the 32 layers"),
        ("llama3-8b", {"pp": 64}, "pp: found 64, expected a divisor of the 32 layers"),
        ("llama3-8b", {"tp": 8, "dim": 12}, "dim: found 12, expected a multiple of tp 8"),
        ("llama3-8b", {"dp": 2, "ep": 2}, "ep: found 2 for a base without experts, expected it left out"),
        ("llama3-8b", {"tp": 2, "etp": 2}, "etp: found 2 for a base without experts, expected it left out"),
        ("llama3-8b", {"etp": 1}, "etp: found 1 for a base without experts, expected it left out"),
        (MOE, {"dp": 4, "ep": 3}, "ep: found 3 with etp 1, expected a product that divides the 4 ranks of tp 1 times"),
        (MOE, {"dp": 8, "ep": 8}, "ep: found 8, expected a divisor of the 4 experts"),
        (MOE, {"dp": 3, "etp": 3}, "etp: found 3, expected a divisor of the 80 features of an expert"),
        (MOE, {"dp": 5, "etp": 5}, "dim: found 16, expected a multiple of etp 5"),
        (MOE, {"tp": 2}, "sequence_parallel: found False with experts and tp above 1, expected it, as in Megatron"),
        (MOE, {"etp": 0}, "etp: found 0, expected an integer from 1"),
        ("llama3-8b", {"tp": 0}, "tp: found 0, expected an integer from 1"),
        ("llama3-8b", {"dp": True}, "dp: found True, expected an integer from 1"),
        ("llama3-8b", {"batch_size": 1.5}, "batch_size: found 1.5, expected an integer from 1"),
        ("llama3-8b", {"sequence_length": 9000}, "sequence_length: found 9000, expected at most the 8192 tokens"),
        ("llama3-8b", {"dp": 4, "gradient_accumulation": 6}, "gradient_accumulation: found 6, expected a multiple of"),
        ("llama3-8b", {"sequence_parallel": True}, "sequence_parallel: found tp 1, expected a tensor-parallel size"),
        (
            "llama3-8b",
            {"tp": 8, "sequence_parallel": True, "sequence_length": 12},
            "sequence_length: found 12, expected a multiple of tp 8",
        ),
        ("llama3-8b", {"dtype": "fp8"}, "dtype: found 'fp8', expected one of fp32, bf16"),
        ("llama3-8b", {"attention": "ring"}, "attention: found 'ring', expected one of flash, local"),
        ("llama3-8b", {"tensor_parallel": 2}, r"explain: found the options \['tensor_parallel'\], expected fields of"),
        ("llama3-8b", {"run": RUN, "tp": 2}, "explain: found both run and tp, expected one of them"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_built(base: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        explain(base, **options)
    assert not torch.distributed.is_initialized()


@every_case(
    ("arguments", "message"),
    [
        (["llama3-8b", "--tp", "3"], "--tp: found 3, expected a divisor of the 14336 features"),
        (["llama3-8b", "--dim", "0"], "--dim: found 0, expected an integer from 1"),
        (["llama3-8b", "--compare", "tp=4,qp=2"], "--compare: found 'qp=2' in 'tp=4,qp=2', expected a name and"),
        (["llama3-8b", "--compare", "tp=four"], "--compare: found 'tp=four', expected an integer"),
        (["llama3-8b", "--compare", "recompute=2"], "--compare: found 'recompute=2', expected true or false"),
        (
            ["llama3-8b", "--compare", "tp=2", "tp=3"],
            "--tp: found 3, expected a divisor of the 14336 features",
        ),
        (["llama3-8b", "--memory", "much"], "--memory: found 'much', expected a size such as 80GiB or 80GB"),
        (["lama"], "base: found 'lama', which is neither a file nor a name"),
        (["llama3-8b", "--tpp", "3"], "unrecognized arguments: --tpp 3"),
    ],
)
def test_the_command_names_the_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dora-fx: error: {message}")


def test_the_command_s_defaults_are_those_of_a_planned_run() -> None:
    run = dataclasses.asdict(PlannedRun())
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in LAYOUT_OPTIONS.items()}
    assert found == {name: run[name] for name in LAYOUT_OPTIONS}


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^DoRA.target_modules: no module matched \['linear_q'\]"):
        explain(TINY, dataclasses.replace(RUN, target_modules=("linear_q",)))
    assert not torch.distributed.is_initialized()


def test_sizes_with_units() -> None:
    assert [bytes_in(text) for text in ("80GiB", "80 GB", "1.5mib", "7")] == [80 << 30, 80 * 10**9, 3 << 19, 7]
    for text in ("GiB", "-1GiB", "0GiB", "80 parsecs"):
        with pytest.raises(UserError, match="--memory"):
            bytes_in(text)


def test_shapes_are_those_of_configs(tmp_path: Path) -> None:
    """A config.json with the published numbers gives the sizes of the name; the folder, its file and the config do."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5).save_pretrained(tmp_path)
    named = architecture_named("llama3-8b")
    for base in (tmp_path, tmp_path / "config.json", LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5)):
        assert architecture_named(base) == dataclasses.replace(named, tied_embeddings=False)
    with pytest.raises(ValueError, match=r"other\.json, expected a config\.json"):
        (tmp_path / "other.json").write_text("{}")
        architecture_named(tmp_path / "other.json")


def test_stages_of_the_schedule(tiny: Explanation) -> None:
    """1F1B: each stage works ahead of those behind it, and no stage further than there are micro-batches."""
    assert [stage.in_flight for stage in tiny.stages] == [3, 2, 1]
    assert [stage.kinds for stage in tiny.stages] == [
        {"layer": 2, "embedding": 1},
        {"layer": 2},
        {"layer": 2, "output": 1},
    ]
    few = dataclasses.replace(RUN, gradient_accumulation=4)
    assert (few.micro_batches, [few.in_flight(stage) for stage in range(3)]) == (2, [2, 2, 1])
    saved = tiny.kinds[0].variants["dora"].saved_bytes
    activations = [stage.variants["dora"].memory.activations for stage in tiny.stages]
    assert activations[:2] == [3 * 2 * saved, 2 * 2 * saved]


def test_a_rank_is_what_its_shards_are(tiny: Explanation) -> None:
    """Parameters written down from the layout: rows and columns of one layer over two ranks."""
    layer = next(kind for kind in tiny.kinds if kind.name == "layer")
    hidden, heads, groups, head, ffn, dim = 48, 4, 2, 12, 80, 4
    qkv = (heads + 2 * groups) * head
    frozen = (qkv * hidden + hidden * heads * head + 2 * ffn * hidden + hidden * ffn) // 2 + qkv // 2 + 2 * hidden
    factors = dim * sum(size for size in (hidden + qkv, heads * head + hidden, hidden + 2 * ffn, ffn + hidden)) // 2
    # Of a row layer every rank has all magnitudes.
    magnitudes = (qkv + 2 * ffn) // 2 + 2 * hidden
    assert (layer.base_parameters, layer.lora_parameters, layer.magnitudes) == (frozen, factors, magnitudes)
    memory = tiny.stages[1].variants["dora"].memory
    assert memory.base == 2 * 2 * frozen and memory.adapters == 2 * (2 * factors + 4 * magnitudes)
    assert memory.optimizer == 2 * (8 * (factors + magnitudes) + 4 * factors)
    assert memory.gradients == 2 * 4 * (factors + magnitudes)


def test_collectives_are_told_by_group_and_owner(tiny: Explanation) -> None:
    first, middle, last = tiny.stages
    for variant in VARIANTS:
        between = [one for one in middle.variants[variant].micro_batch if one.group == "pp"]
        assert {(one.kind, one.count, one.num_bytes) for one in between} == {
            (kind, 2, 8 * 48 * 2) for kind in ("send", "receive")
        }
    assert [
        sum(one.count for one in stage.variants["dora"].micro_batch if one.group == "pp") for stage in (first, last)
    ] == [2, 2]
    gradients = {variant: middle.variants[variant].step.gradients for variant in VARIANTS}
    assert gradients["base"] == ()
    replicas = {
        variant: sum(one.num_bytes for one in gradients[variant] if one.group == "dp") for variant in ("lora", "dora")
    }
    assert replicas["dora"] == middle.variants["dora"].memory.gradients
    assert replicas["lora"] == middle.variants["lora"].memory.gradients < replicas["dora"]
    # The base sends nothing once per step, LoRA gathers factors, and DoRA completes norms as well.
    refresh = {variant: {one.kind for one in middle.variants[variant].step.refresh} for variant in VARIANTS}
    assert refresh == {"base": set(), "lora": {"all_gather"}, "dora": {"all_gather", "all_reduce"}}
    sites = {one.site for one in tiny.kinds[0].variants["base"].forward.collectives}
    assert any("linear_proj" in site for site in sites) and any("linear_fc2" in site for site in sites)


def test_dora_costs_more_than_lora_and_both_more_than_the_base(tiny: Explanation) -> None:
    layer = tiny.kinds[0]
    flops = [layer.variants[variant].flops for variant in VARIANTS]
    assert flops[0] < flops[1] == flops[2]
    peaks = [tiny.stages[0].variants[variant].memory.peak for variant in VARIANTS]
    assert peaks[0] < peaks[1] < peaks[2]


@pytest.mark.slow
def test_recomputation_keeps_the_input_alone() -> None:
    run = PlannedRun(sequence_length=16, dim=4, recompute=True)
    plain = explain(TINY, dataclasses.replace(run, recompute=False)).kinds[0].variants["dora"]
    layer = explain(TINY, run).kinds[0].variants["dora"]
    # A checkpoint keeps the state of the random numbers too, as bytes.
    kept = [(tensor.name, tensor.num_bytes) for tensor in layer.saved if tensor.dtype != "uint8"]
    assert kept == [("hidden_states", 16 * 48 * 2)]
    assert layer.forward.flops == plain.forward.flops
    assert plain.backward.flops < layer.backward.flops <= plain.flops
    assert layer.saved_bytes < plain.saved_bytes


@pytest.mark.slow
def test_query_groups_are_padded_as_they_are_for_training() -> None:
    """Three groups on two ranks are four, with their queries."""
    three = dataclasses.replace(TINY, num_attention_heads=6, num_query_groups=3, tied_embeddings=False)
    four = dataclasses.replace(three, num_attention_heads=8, num_query_groups=4)
    run = PlannedRun(tp=2, sequence_length=16, dim=4)
    assert explain(three, run).kinds == explain(four, run).kinds


def test_json_is_the_records(tiny: Explanation) -> None:
    read = json.loads(tiny.to_json())
    assert read["run"]["tp"] == 2 and read["largest_stage"] == tiny.largest_stage.stage
    stage = read["stages"][1]["variants"]["lora"]
    assert stage["memory"]["peak"] == tiny.stages[1].variants["lora"].memory.peak
    assert read["kinds"][0]["variants"]["dora"]["saved_bytes"] == tiny.kinds[0].variants["dora"].saved_bytes


def save_tiny_config(folder: Path) -> None:
    transformers.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, head_dim=12,
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.slow
def test_the_command_draws_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_config(tmp_path)
    file = tmp_path / "layer.svg"
    options = ["explain", str(tmp_path), "--tp", "2", "--sequence-length", "16", "--dim", "4"]
    assert main([*options, "--tree", "--picture", str(file)]) == 0
    shown = capsys.readouterr()
    assert str(file) in shown.err
    for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        assert name in shown.out and name in file.read_text()
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_the_command_draws_a_layer_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.MixtralConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, num_local_experts=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    file = tmp_path / "layer.svg"
    options = ["--dp", "2", "--ep", "2", "--sequence-length", "16", "--dim", "4", "--tree", "--picture", str(file)]
    assert main(["explain", str(tmp_path), *options]) == 0
    shown = capsys.readouterr().out
    for name in ("experts.local_experts.1.linear_fc1", "all_to_all_single over 2"):
        assert name in shown and name in file.read_text()
    # A box says what it does.
    assert " =  (" not in shown


def test_pictures_that_cannot_be_made_are_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--picture", str(tmp_path / "layer.png")], "expected a name of a .svg file in a folder that exists"),
        (["--picture", str(tmp_path / "nowhere" / "layer.svg")], "expected a name of a .svg file in a folder"),
        (["--tree", "--json"], "--tree: found --json beside it"),
        (["--tree", "--compare", "tp=1"], "--tree: found --compare beside it"),
    ):
        assert main(["explain", "llama3-70b", *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_compares_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_config(tmp_path)
    arguments = ["explain", str(tmp_path), "--sequence-length", "16", "--dim", "4", "--memory", "0.5MiB"]
    layouts = ["--compare", "tp=1,pp=1", "tp=2,pp=2,sequence-parallel=true"]
    code = main([*arguments, *layouts, "--json"])
    records = json.loads(capsys.readouterr().out)
    assert code == (0 if any(one["fits"] for one in records) else 1)
    assert [(one["run"]["tp"], one["run"]["pp"], one["run"]["sequence_parallel"]) for one in records] == [
        (1, 1, False),
        (2, 2, True),
    ]
    assert [one["fits"] for one in records] == [
        one["stages"][one["largest_stage"]]["peak"] <= one["memory"] for one in records
    ]
    code = main([*arguments, "--target-modules", "linear_qkv"])
    printed = capsys.readouterr().out
    assert code == (0 if "\nfits: " in printed else 1)
    assert "estimated peak" in printed and "stage" in printed and "GiB" in printed


def test_captured_layers_carry_both_graphs() -> None:
    [layer] = captured_layers(TINY, RUN)
    assert (layer.name, layer.count) == ("layer", 2)
    assert len(layer.before.find_nodes(op="call_function", target=dora_linear)) == 4
    assert not layer.after.find_nodes(op="call_function", target=dora_linear)
    scaled = layer.after.find_nodes(op="call_function", target=scale_rows)
    assert scaled and all(isinstance(node.meta["example_value"], torch.Tensor) for node in scaled)


@pytest.mark.slow
@every_case("architecture, layout", [(TINY, {"pp": 3, "recompute": True}), (MOE, {"dp": 2, "ep": 2})])
def test_a_picture_shows_all_that_is_saved(architecture: GPTArchitecture, layout: dict[str, Any]) -> None:
    """Every tensor but the hidden states that came in: what autograd functions keep, and states of random numbers."""
    run = PlannedRun(tp=2, sequence_parallel=True, sequence_length=16, dim=4, **layout)
    kept: list[TensorFacts] = []
    for layer in captured_layers(architecture, run):
        after = describe_layer(layer.before, layer.after, "layer", kept=layer.kept).after
        kept += [tensor for box in after.boxes for tensor in box.kept or ()]
    saved = explain(architecture, run).kinds[0].variants["dora"].saved
    expected = sorted(tensor.num_bytes for tensor in saved if tensor.name != "hidden_states")
    assert sorted(tensor.nbytes or 0 for tensor in kept) == expected


@pytest.mark.usefixtures("world")
def test_attaching_under_fake_tensors_reads_no_values() -> None:
    kinds = ["column", "row_bias_added", "linear_bias"]
    with FakeTensorMode():
        zoo = LinearZoo(kinds)
        dora_fx.DoRA(kinds, dim=DIM)(zoo)
        for path, site in sites(zoo).items():
            assert all(isinstance(value, FakeTensor) for value in (*site.parameters(), *site.buffers())), path
            with pytest.raises(
                ValueError, match=f"^{path}: found fake tensors, which have no values to compute a norm"
            ):
                site._get_weight_norm()
    real = adapt_zoo(LinearZoo(kinds))
    shapes = {name: (value.shape, value.dtype) for name, value in real.named_parameters()}
    assert {name: (value.shape, value.dtype) for name, value in zoo.named_parameters()} == shapes
    # Real weights are still looked at.
    with torch.no_grad():
        bad = LinearZoo(["row"])
        bad.row.weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^row: the base weight has NaN or inf"):
        dora_fx.DoRA(["row"], dim=DIM)(bad)


@pytest.mark.usefixtures("world")
def test_a_process_with_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^torch\.distributed: found a default process group, expected none"):
        explain(TINY, RUN)


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_a_model_of_the_users_own() -> None:
    """Built under FakeTensorMode, it costs what a rank of the same architecture does; others are refused by name."""
    run = PlannedRun(sequence_length=16, dim=4, target_modules=("linear_qkv", "linear_fc2"), attention="local")
    with FakeTensorMode():
        model = empty_gpt_model(TINY, run.torch_dtype, sequence_parallel=False)
    for wrong, message in (
        ({"tp": 2}, "tp: found 2, expected 1"),
        ({"dtype": "fp32"}, "dtype: found torch.float32"),
        ({"attention": "flash"}, "attention: found flash, expected local"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            explain(model, dataclasses.replace(run, **wrong))
    with pytest.raises(TypeError, match=r"^base: found a Linear without decoder\.layers"):
        explain(torch.nn.Linear(2, 2), run)
    with pytest.raises(ValueError, match=r"^base: found a model with real parameters"):
        explain(empty_gpt_model(TINY, run.torch_dtype, sequence_parallel=False), run)
    found = explain(model, run)
    [stage] = found.stages
    assert stage.kinds == {"layer": 6, "embedding": 1, "output": 1}
    layer = found.kinds[0]
    assert layer.magnitudes == (4 + 2 * 2) * 12 + 48
    assert {tensor.site for tensor in layer.variants["dora"].saved} >= {"", "mlp"}
    assert not sites(model)
    # Megatron's own attention is what the model has.
    assert any(tensor.shape[-2:] == (16, 16) for tensor in layer.variants["dora"].saved)


def test_experts_are_counted_where_they_are() -> None:
    """A rank has its share of the experts and of their tokens; their gradients go to the ranks that have the same."""
    shared = {"sequence_length": 16, "dim": 4, "sequence_parallel": True, "tp": 2}
    one, two = (explain(MOE, dp=4, ep=ep, etp=2, **shared) for ep in (1, 2))
    layer, of_two = one.kinds[0], two.kinds[0]
    expert = 3 * 80 * 48 // 2
    assert layer.base_parameters - of_two.base_parameters == 2 * expert
    for variant in VARIANTS:
        # Four micro-batches' tokens go to as many experts as one's did.
        assert layer.variants[variant].flops == of_two.variants[variant].flops
    gradients = {each.group: each.num_ranks for each in two.stages[0].variants["dora"].step.gradients}
    assert gradients.keys() >= {"dp", "edp"} and (gradients["dp"], gradients["edp"]) == (4, 2)
    sent = {(each.kind, each.group) for each in of_two.variants["base"].forward.collectives}
    assert {("all_to_all_single", "ep"), ("all_gather", "etp"), ("reduce_scatter", "etp")} <= sent
    assert {("all_to_all_single", "ep")}.isdisjoint(
        (each.kind, each.group) for each in layer.variants["base"].forward.collectives
    )
    assert one.num_experts == 4 and "tokens go to 4 experts evenly" in text_of(explanation_tables(one))


@pytest.mark.usefixtures("world")
def test_a_model_of_experts_is_itself_again() -> None:
    run = PlannedRun(sequence_length=16, dim=4, dtype="fp32", attention="local")
    with FakeTensorMode():
        model = empty_gpt_model(MOE, run.torch_dtype, sequence_parallel=False)
    before = {name: type(module) for name, module in model.named_modules()}
    for wrong, message in (
        ({"dp": 2, "ep": 2}, "dp: found 2, expected 1, as the model was built"),
        ({"etp": 1, "tp": 2, "sequence_parallel": True}, "tp: found 2, expected 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            explain(model, dataclasses.replace(run, **wrong))
    model.config.moe_latent_size = 8
    with pytest.raises(ValueError, match=r"^decoder\.layers\.0\.mlp: found moe_latent_size = 8, expected None"):
        explain(model, run)
    model.config.moe_latent_size = None
    found = explain(model, run)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert found.kinds[0].lora_parameters > 0
