"""Which experts a configuration adapts, what it says of them, and what it refuses; on one process."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import nn

import dora_fx
from dora_fx.attach.matching import matches
from dora_fx.checkpoint.tensor_digests import add_digests, shard_digests
from tests.distributed.moe_layers import EXPERTS, FFN, HIDDEN, ExpertLayout, MoE, batch, moe_config, named_sites
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")


def moe(**settings: Any) -> MoE:
    return MoE(moe_config(ExpertLayout(), torch.float32, **settings))


def attach(model: nn.Module, targets: list[str], **settings: Any) -> dora_fx.DoRA:
    dora = dora_fx.DoRA(targets, dim=4, alpha=8, **settings)
    dora(model)
    return dora


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, dora_fx.DoRALinear)]


def test_the_report_has_a_line_for_all_experts() -> None:
    dora = attach(moe(), ["*.experts.*"])
    lines = str(dora.report).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["mlp.experts.local_experts.0-3.linear_fc1"] == ["column", "48x16", "4x16", "48x4", "1,216"]
    assert rows["mlp.experts.local_experts.0-3.linear_fc2"] == ["row", "16x24", "4x24", "16x4", "704"]
    assert len(lines) == 5 and lines[-2].startswith("8 layers adapted: 1,920 trainable")
    assert lines[-1] == "not adapted: mlp.shared_experts.linear_fc1, mlp.shared_experts.linear_fc2"
    some = attach(moe(), ["*.local_experts.0-1.*", "*.local_experts.3.*"])
    assert "mlp.experts.local_experts.0-1,3.linear_fc1" in str(some.report)
    assert "not adapted: mlp.experts.local_experts.2.linear_fc1" in str(some.report)


@every_case(
    ("pattern", "path", "is_named"),
    [
        ("*.local_experts.1-2.*", "mlp.experts.local_experts.1.linear_fc1", True),
        ("*.local_experts.1-2.*", "mlp.experts.local_experts.2.linear_fc1", True),
        ("*.local_experts.1-2.*", "mlp.experts.local_experts.12.linear_fc1", False),
        ("*.local_experts.9-12.linear_fc1", "mlp.experts.local_experts.12.linear_fc1", True),
        ("*.local_experts.9-12.linear_fc1", "mlp.experts.local_experts.12.linear_fc2", False),
        ("decoder.layers.0-1.*.local_experts.2-3.*", "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2", True),
        ("decoder.layers.0-1.*.local_experts.2-3.*", "decoder.layers.2.mlp.experts.local_experts.3.linear_fc2", False),
        ("*.layers.0-1.linear_fc1", "mlp.linear_fc1", False),
    ],
)
def test_ranges_of_numbers(pattern: str, path: str, is_named: bool) -> None:
    assert matches(pattern, path) is is_named


def test_all_linear_is_experts_and_shared_ones_but_no_router() -> None:
    model = moe()
    attach(model, ["all-linear"])
    assert len(adapted_paths(model)) == 10 and not any("router" in path for path in adapted_paths(model))


def test_latent_projections_are_adapted_where_they_are_named() -> None:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"fc1_latent_proj": nn.Linear(8, 8), "linear_fc1": nn.Linear(8, 8)})

    cases = {("mlp.*", "*proj"): 1, ("all-linear",): 1, ("*latent*",): 1, ("mlp.*", "fc1_latent_proj"): 2}
    for targets, number in cases.items():
        model = Latent()
        attach(model, list(targets), allow_unmatched=True)
        assert len(adapted_paths(model)) == number, targets


def grouped_mlp() -> nn.Module:
    model = moe()
    model.mlp.experts.__class__ = type("GroupedMLP", (nn.Module,), {})
    model.mlp.experts.local_experts = nn.ModuleList()
    # Megatron's class has the columns of all experts side by side.
    model.mlp.experts.weight1 = nn.Parameter(torch.ones(HIDDEN, 2 * FFN * EXPERTS))
    return model


@every_case(
    ("build", "targets", "settings", "error", "message"),
    [
        (moe, ["router"], {}, TypeError, "mlp.router: target 'router' names a TopKRouter, whose weight chooses"),
        (moe, ["*.router"], {}, ValueError, "no module matched .*it names mlp.router, a TopKRouter, whose weight"),
        (moe, ["*.router", "*.experts.*"], {}, ValueError, "'.*router' matched nothing; it names mlp.router"),
        (
            moe,
            ["*.experts.*"],
            {"rank_pattern": {"*.local_experts.2.*": 8}},
            ValueError,
            r"mlp.experts.local_experts.2.linear_fc1: found dim and alpha \(8, 8\) and \(4, 8\), expected the same for",
        ),
        (
            moe,
            ["*.experts.*"],
            {"alpha_pattern": {"*.local_experts.1-3.linear_fc2": 16}},
            ValueError,
            r"mlp.experts.local_experts.1.linear_fc2: found dim and alpha \(4, 16\) and \(4, 8\), expected the same",
        ),
        (
            grouped_mlp,
            ["*.experts.*", "*linear_fc1"],
            {},
            TypeError,
            "mlp.experts: .* found a GroupedMLP",
        ),
        (grouped_mlp, ["all-linear"], {}, TypeError, "mlp.experts: target 'all-linear' means experts"),
    ],
)
def test_refused_by_name(build: Any, targets: list[str], settings: Any, error: Any, message: str) -> None:
    model = build()
    with pytest.raises(error, match=message):
        attach(model, targets, **settings)
    assert not adapted_paths(model) and all(parameter.requires_grad for parameter in model.parameters())


@every_case(
    "name",
    [
        "use_transformer_engine_op_fuser",
        "moe_single_grouped_weight",
        "moe_paged_stash",
        "overlap_dispatch_backward_with_experts_wgrad",
    ],
)
def test_settings_under_which_adapted_experts_would_compute_something_else(name: str) -> None:
    model = moe()
    setattr(model.mlp.config, name, True)
    with pytest.raises(ValueError, match=f"mlp: found adapted experts with {name} = True, expected False: "):
        attach(model, ["*.experts.*"])
    attach(model, ["*.shared_experts.*"])


def test_dispatchers_that_were_not_tried(caplog: pytest.LogCaptureFixture) -> None:
    model = moe()
    model.mlp.config.moe_token_dispatcher_type = "flex"
    with caplog.at_level(logging.WARNING, "dora_fx"):
        attach(model, ["*.shared_experts.*"])
        assert not caplog.records
        attach(model, ["*.experts.*", "*.shared_experts.*"])
    assert "mlp: found the flex dispatcher of tokens, which adapted experts were not tried with" in caplog.text


def test_an_expert_without_tokens_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    """All tokens are one, which is routed to two experts of four."""
    model = moe()
    attach(model, ["*.experts.*", "*.shared_experts.*"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with caplog.at_level(logging.WARNING, "dora_fx"):
        model(batch(1).float()).square().sum().backward()
        gradients = [bool(site.adapter.weight_magnitude.grad.any()) for site in named_sites(model).values()]
        optimizer.step()
    assert gradients.count(False) == 4 and not caplog.records


def test_experts_that_no_gradient_reaches(caplog: pytest.LogCaptureFixture) -> None:
    model = moe()
    attach(model, ["*.experts.*", "*.shared_experts.*"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with caplog.at_level(logging.WARNING, "dora_fx"):
        model.mlp.shared_experts(batch(0).float())[0].square().sum().backward()
        optimizer.step()
    assert "mlp.experts.local_experts.0.linear_fc1" in caplog.text and "in 8 of 10 adapted layers" in caplog.text


def test_a_base_with_other_experts_in_its_layers_has_another_digest() -> None:
    """The same two weights, expert 1 of layer 0 and expert 0 of layer 1, the other way round."""
    digests = []
    for places in (((0, 1), (1, 0)), ((1, 0), (0, 1))):
        shards = [
            ShardedTensor.from_rank_offsets(
                "weight", torch.full((2, 3), float(number)), (0, layer, 2), (1, expert, 2), prepend_axis_num=2
            )
            for number, (layer, expert) in enumerate(places, 1)
        ]
        digests.append(add_digests([shard_digests(shards)]))
    assert digests[0] != digests[1]


def test_excluded_experts_of_one_parameter() -> None:
    model = grouped_mlp()
    dora = attach(model, ["all-linear"], exclude_modules=["mlp.experts.*"])
    assert len(adapted_paths(model)) == 2
    assert f"1 x mlp.experts.weight1 ({HIDDEN}x{2 * FFN * EXPERTS})" in str(dora.report)
