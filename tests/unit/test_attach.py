"""Which modules `DoRA` adapts, what it freezes, what it reports, and that attaching twice is attaching once."""

from __future__ import annotations

import itertools
import logging
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from torch import nn

import dora_fx
from dora_fx.attach.matching import matches
from tests.closeness import assert_close, rounding, roundings_of
from tests.models import DIM, GPT_TARGETS, config, logits_of, sites, tiny_gpt, token_ids, trainable
from tests.tables import every_case
from tests.unit.hostile_files import is_endless

pytestmark = pytest.mark.usefixtures("world")


def paths(dora: dora_fx.DoRA, model: nn.Module) -> list[str]:
    dora(model)
    return list(sites(model))


@every_case(
    ("targets", "excluded", "expected"),
    [
        (["linear_qkv"], [], [f"decoder.layers.{i}.self_attention.linear_qkv" for i in range(2)]),
        (["decoder.layers.1.mlp.linear_fc1"], [], ["decoder.layers.1.mlp.linear_fc1"]),
        (["*.layers.0.*.linear_fc*"], [], ["decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2"]),
        (["*"], ["decoder.*"], ["output_layer"]),
        (["*.mlp.*"], ["linear_fc1", "*.layers.0.*"], ["decoder.layers.1.mlp.linear_fc2"]),
        (["*.1.*proj", "output_layer"], [], ["decoder.layers.1.self_attention.linear_proj", "output_layer"]),
    ],
)  # fmt: skip
def test_names_paths_and_wildcards(targets: list[str], excluded: list[str], expected: list[str]) -> None:
    assert paths(dora_fx.DoRA(targets, excluded, dim=DIM), tiny_gpt()) == expected


def test_name_is_not_a_prefix_and_wildcard_is_no_other_regex() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4), "aXq": nn.Linear(4, 4)})
    assert paths(dora_fx.DoRA(["q"], dim=2), model) == ["q"]
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "aXq": nn.Linear(4, 4)})
    assert paths(dora_fx.DoRA(["a.q*"], dim=2), model) == ["a.q"]


def test_wildcards_match_what_a_regular_expression_would() -> None:
    """All patterns of five characters against all paths of six."""
    paths = ["".join(characters) for length in range(7) for characters in itertools.product("a.", repeat=length)]
    for characters in itertools.product("a.*", repeat=5):
        pattern = "".join(characters)
        if "*" in pattern:
            expression = re.compile(".*".join(map(re.escape, pattern.split("*"))))
            found = [path for path in paths if matches(pattern, path)]
            assert found == [path for path in paths if expression.fullmatch(path)], pattern


def test_many_wildcards_end() -> None:
    """A regular expression tries every way to share the path among them."""
    path, pattern = "a" * 60 + "b", "*a" * 30 + "*c"
    code = "import re, sys\npass\nre.fullmatch(sys.argv[1].replace('*', '.*'), sys.argv[2])"
    assert is_endless(code, pattern, path)
    assert not matches(pattern, path) and matches(pattern.replace("c", "b"), path)


def test_returns_what_it_was_given_frozen_and_in_training_mode() -> None:
    model = tiny_gpt().eval()
    assert dora_fx.DoRA(dim=DIM)(model) is model
    assert all(module.training for module in model.modules())
    assert trainable(model)
    assert all(".adapter." in name for name in trainable(model))


def test_training_false_freezes_everything_in_evaluation_mode() -> None:
    model = dora_fx.DoRA(dim=DIM)(tiny_gpt(), training=False)
    assert not trainable(model)
    assert not any(module.training for module in model.modules())
    dora_fx.DoRA(dim=DIM)(model, training=True)
    assert model.training


def test_list_of_chunks_is_one_model() -> None:
    chunks = [nn.ModuleDict({"first": nn.Linear(4, 6)}), nn.ModuleDict({"second": nn.Linear(6, 4)})]
    dora = dora_fx.DoRA(["first", "second"], dim=2)
    assert dora(chunks) is chunks
    assert [list(sites(chunk)) for chunk in chunks] == [["first"], ["second"]]
    assert [site.path for site in dora.report.sites] == ["first", "second"]
    assert dora.report.num_trainable == 2 * (2 * 10 + 5)


def test_attaching_twice_is_attaching_once() -> None:
    model = tiny_gpt()
    dora_fx.DoRA(dim=DIM)(model)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    again = dora_fx.DoRA(dim=DIM)
    again(model)
    assert [id(module) for module in model.modules()] == modules
    assert {name: id(p) for name, p in model.named_parameters()} == {name: before[name][0] for name in before}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert len(again.report.sites) == 8


def test_adapters_of_an_earlier_call_for_other_targets_train_on() -> None:
    model = dora_fx.DoRA(["linear_qkv"], dim=DIM)(tiny_gpt())
    dora_fx.DoRA(["linear_proj"], dim=2 * DIM)(model)
    trained = {path for path, site in sites(model).items() if site.adapter.linear_out.weight.requires_grad}
    assert trained == set(sites(model)) and len(trained) == 4
    assert not any(site.weight.requires_grad for site in sites(model).values())


def test_second_call_keeps_trained_values_and_adds_other_targets() -> None:
    model = dora_fx.DoRA(["linear_qkv"], dim=DIM)(tiny_gpt())
    first = sites(model)["decoder.layers.0.self_attention.linear_qkv"].adapter
    with torch.no_grad():
        first.linear_out.weight.fill_(0.25)
    dora_fx.DoRA(["linear_qkv", "linear_proj"], dim=DIM)(model)
    assert len(sites(model)) == 4
    assert (first.linear_out.weight == 0.25).all()
    assert first.linear_out.weight.requires_grad


def test_same_seed_same_values_and_no_random_number_drawn() -> None:
    def attached(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny_gpt()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        dora_fx.DoRA(dim=DIM)(model)
        assert torch.equal(torch.get_rng_state(), state)
        return {path: site.adapter.linear_in.weight.detach() for path, site in sites(model).items()}

    first, same, other = attached(3), attached(3), attached(4)
    assert all(torch.equal(first[path], same[path]) for path in first)
    assert not any(torch.equal(first[path], other[path]) for path in first)
    qkv = [first[f"decoder.layers.{layer}.self_attention.linear_qkv"] for layer in (0, 1)]
    assert not torch.equal(*qkv)


@every_case(
    ("method", "std", "largest"),
    [
        ("xavier", (2 / (256 + 512)) ** 0.5, None),
        ("normal", 0.2, None),
        ("kaiming", 512**-0.5 / 3**0.5, 512**-0.5),
        ("zero", 0.0, 0.0),
    ],
)
def test_initial_values(method: str, std: float, largest: float | None) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(512, 128)})
    dora_fx.DoRA(["linear"], dim=256, lora_A_init_method=method)(model)
    lora_a = model["linear"].adapter.linear_in.weight.double()
    # Standard deviations of the two for normal draws; uniform ones spread less.
    assert abs(lora_a.std().item() - std) <= 5 * std / (2 * lora_a.numel()) ** 0.5
    assert abs(lora_a.mean().item()) <= 5 * std / lora_a.numel() ** 0.5
    assert largest is None or lora_a.abs().max().item() <= largest
    assert not model["linear"].adapter.linear_out.weight.any()


def test_magnitude_starts_as_the_norm_with_any_initial_b() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(40, 24).double()})
    dora_fx.DoRA(["linear"], dim=4, alpha=6, lora_B_init_method="normal")(model)
    adapter = model["linear"].adapter
    dense = model["linear"].weight + 1.5 * adapter.linear_out.weight @ adapter.linear_in.weight
    assert_close(adapter.get_weight_magnitude(), dense.norm(dim=1), rounding(torch.float64, 40 + 4))


def test_report() -> None:
    model = tiny_gpt()
    dora = dora_fx.DoRA(["linear_qkv", "linear_fc2"], ["*.layers.1.*"], dim=DIM)
    dora(model)
    qkv, fc2 = dora.report.sites
    assert (qkv.path, qkv.layout) == ("decoder.layers.0.self_attention.linear_qkv", "column")
    assert (qkv.weight, qkv.lora_a, qkv.lora_b) == ((64, 32), (DIM, 32), (64, DIM))
    assert qkv.trainable == DIM * 32 + 64 * DIM + 64
    assert (fc2.path, fc2.layout, fc2.weight) == ("decoder.layers.0.mlp.linear_fc2", "row", (32, 48))
    assert dora.report.num_trainable == sum(parameter.numel() for parameter in trainable(model).values())
    assert dora.report.num_total == sum(parameter.numel() for parameter in model.parameters())
    assert "decoder.layers.1.mlp.linear_fc2" in dora.report.unmatched_linears
    assert "decoder.layers.0.mlp.linear_fc1" in dora.report.unmatched_linears
    assert "output_layer" in dora.report.unmatched_linears
    text = str(dora.report)
    share = 100 * dora.report.num_trainable / dora.report.num_total
    for fragment in (qkv.path, "64x32", fc2.path, f"({share:.2f} %)", "2 layers adapted", "output_layer"):
        assert fragment in text


def test_unmatched_target_is_a_warning_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dora_fx"):
        model = dora_fx.DoRA(["linear_qkv", "linear_prj"], dim=DIM, allow_unmatched=True)(tiny_gpt())
    assert len(sites(model)) == 2
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("dora_fx")]
    assert "'linear_prj' matched nothing" in message
    assert message.index("linear_proj") < message.index("linear_qkv")


def test_inside_float16_module() -> None:
    inner = tiny_gpt(bf16=True, params_dtype=torch.bfloat16)
    model = Float16Module(inner.config, inner)
    dora_fx.DoRA(GPT_TARGETS, dim=DIM)(model)
    adapter = next(iter(sites(inner).values())).adapter
    assert adapter.linear_in.weight.dtype == adapter.linear_out.weight.dtype == torch.bfloat16
    assert adapter.weight_magnitude.dtype == torch.float32
    logits_of(model, token_ids()).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(model).values())


class Regression(nn.Module):
    """Two layers; Megatron's data-parallel wrapper wants a config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = config()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def data_parallel(module: Regression, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module.config, DistributedDataParallelConfig(**settings), module)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_inside_data_parallel_wrapper_gradients_reach_the_buffers_once(wrapped_first: bool) -> None:
    dora = dora_fx.DoRA(["first", "second"], dim=2, lora_B_init_method="normal")
    torch.manual_seed(0)
    module, x = Regression(), torch.randn(5, 4)
    if wrapped_first:
        model = data_parallel(module)
        assert dora(model) is model
        dora(model)
    else:
        model = data_parallel(dora(module))
    model(x).square().sum().backward()
    buffered = {name: parameter.main_grad.clone() for name, parameter in trainable(module).items()}
    alone = Regression()
    alone.load_state_dict({name: value for name, value in module.state_dict().items() if "adapter" not in name})
    dora(alone)
    alone.load_state_dict(module.state_dict())
    alone(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in trainable(alone).items()}
    assert buffered.keys() == expected.keys()
    assert_close(buffered, expected, rounding(torch.float32, 2 * roundings_of(module)))


def test_data_parallel_buffers_hold_the_adapters_alone() -> None:
    model = data_parallel(Regression())
    dora_fx.DoRA(["second"], dim=2)(model)
    buffered = sum(buffer.numel_unpadded for buffer in model.buffers if buffer is not None)
    assert buffered == sum(parameter.numel() for parameter in trainable(model).values()) == 2 * (8 + 4) + 4


def test_a_wrapper_keeps_its_groups_and_its_bucketing() -> None:
    groups = ProcessGroupCollection()
    for name in ("dp", "dp_cp", "expt_dp", "tp", "pp", "ep"):
        setattr(groups, name, dist.new_group([0]))
    settings = DistributedDataParallelConfig(overlap_grad_reduce=True)
    module = Regression()
    model = DistributedDataParallel(module.config, settings, module, disable_bucketing=True, pg_collection=groups)
    buffers = model.buffers
    dora_fx.DoRA(["second"], dim=2)(model)
    assert model.buffers is not buffers
    assert all(buffer.data_parallel_group is groups.dp_cp for buffer in model.buffers)
    for name in ("dp", "dp_cp", "expt_dp", "tp", "pp", "ep"):
        assert getattr(model, f"{name}_group") is getattr(groups, name)
    assert model.bucket_size is None


def test_layers_that_count_in_another_way_keep_their_names() -> None:
    for numbers in ([1, 1], [2, 1], [3, None]):
        layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in numbers)
        for layer, number in zip(layers, numbers, strict=True):
            layer.layer_number = number
        dora = dora_fx.DoRA(["0.q"], dim=2)
        dora(layers)
        assert [site.path for site in dora.report.sites] == ["0.q"]
