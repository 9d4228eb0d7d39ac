"""The backend: found by name, its options, its counters, its traces."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from tests.closeness import assert_close, rounding, roundings_of
from tests.graph.sites import IN, adapted, column
from tests.models import randomize_adapters
from tests.tables import every_case


@pytest.fixture
def model(tensor_parallel):
    tensor_parallel(1)
    model = adapted(column())
    randomize_adapters(model)
    return model


def run(model, **settings):
    return torch.compile(model, backend="dora_fx", fullgraph=True, **settings)(torch.randn(3, 2, IN))[0]


def test_found_by_name():
    assert "dora_fx" in torch.compiler.list_backends()


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager", "inductor"])
def test_inner_compilers_agree_with_eager(model, inner_compiler):
    x = torch.randn(3, 2, IN)
    compiled = torch.compile(model, backend="dora_fx", options={"inner_compiler": inner_compiler}, fullgraph=True)
    assert_close(compiled(x)[0], model(x)[0], rounding(x.dtype, roundings_of(model)))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, (False, True, False)),
        ({"options": {"fallback_random": True, "epilogue-fusion": False}}, (True, False, False)),
        ({"mode": "max-autotune-no-cudagraphs"}, (False, True, True)),
    ],
)
def test_inductor_option_and_mode_reach_inductor(model, settings, found):
    seen = []

    def note_config(graph):
        config = torch._inductor.config
        seen.append((config.fallback_random, config.epilogue_fusion, config.max_autotune))

    # A pass of Inductor's runs with the settings that it compiles with.
    with torch._inductor.config.patch(post_grad_custom_post_pass=note_config, force_disable_caches=True):
        run(model, **settings)
    assert seen == [found]


@every_case(
    ("settings", "message"),
    [
        ({"options": {"inner_compiler": "tvm"}}, r"found 'tvm', expected one of"),
        ({"options": {"fallback_randm": True}}, r"unknown option 'fallback_randm'; the nearest are .*fallback_random"),
        ({"options": {"fallback_random": "yes"}}, r"found 'yes', expected a bool"),
        ({"options": {"unmatched": "ignore"}}, r"unmatched: found 'ignore', expected one of \['warn', 'error'\]"),
        ({"options": {"rank_timeout": 0}}, r"rank_timeout: found 0, expected a positive number of seconds"),
        ({"mode": "fastest"}, r"mode: found 'fastest', expected one of"),
        ({"options": {"inner_compiler": "eager", "fallback_random": True}}, r"takes no Inductor settings"),
    ],
)
def test_unknown_settings_are_errors(model, settings, message):
    with pytest.raises(BackendCompilerFailed, match=message):
        run(model, **settings)


def test_counters_and_logs(model, caplog):
    counters.clear()
    with caplog.at_level(logging.INFO, logger="dora_fx"):
        run(model, options={"inner_compiler": "eager"})
    assert dict(counters["dora_fx"]) == {"sites_rewritten": 1, "sites_unmatched": 0, "graphs_compiled": 1}
    assert "DoRA sites rewritten: 1 (linear)" in caplog.text


def test_the_log_names_sites_that_run_beside_their_base_layers(tensor_parallel, caplog):
    tensor_parallel(1)
    model = adapted(nn.Linear(IN, IN))
    model.linear.to_wrap.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with caplog.at_level(logging.INFO, logger="dora_fx"):
        torch.compile(model, backend="dora_fx", options={"inner_compiler": "eager"})(torch.randn(3, IN))
    assert "DoRA sites rewritten: 1 (linear); 1 of them beside their base layers (linear)" in caplog.text
