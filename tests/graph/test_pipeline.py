"""What a list of passes leaves behind for whoever looks: op counts in the log, graphs in the trace."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import pytest
import torch
from torch import fx, nn

from dora_fx.passes.pipeline import describe_change, run_passes
from tests.graph.capture import capture
from tests.graph.sites import IN, adapted, column


def test_describe_change() -> None:
    assert describe_change(Counter(mul=2, add=1), Counter(mul=1, sub=3)) == "-1 add, -1 mul, +3 sub"
    assert describe_change(Counter(mul=2), Counter(mul=2)) == "no change"


def twice(gm: fx.GraphModule, example_inputs: object, *, function: object) -> fx.GraphModule:
    [output] = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        doubled = gm.graph.call_function(function, (output.args[0], 2))
    output.args = (doubled,)
    gm.recompile()
    return gm


def test_passes_run_in_order_and_each_is_logged_with_its_change(caplog: pytest.LogCaptureFixture) -> None:
    gm = fx.symbolic_trace(nn.Identity())
    passes = [partial(twice, function=torch.add), partial(twice, function=torch.mul)]
    with caplog.at_level(logging.DEBUG, "dora_fx.passes.pipeline"):
        changed = run_passes(gm, (), passes)
    assert changed(torch.tensor(3.0)) == (3.0 + 2.0) * 2.0
    lines = [record.getMessage() for record in caplog.records if record.name == "dora_fx.passes.pipeline"]
    assert [line.partition(" ")[0] for line in lines] == ["twice", "twice"]
    assert [line.partition(": ")[2] for line in lines] == ["+1 torch.add", "+1 torch.mul"]


def test_the_trace_has_the_graph_before_and_after(tensor_parallel, caplog: pytest.LogCaptureFixture) -> None:
    tensor_parallel(1)
    with caplog.at_level(logging.DEBUG, "torch.__trace"):
        capture(adapted(column()), IN)
    traced = [record for record in caplog.records if record.name == "torch.__trace"]
    artifacts = {
        record.metadata["artifact"]["name"]: record.payload
        for record in traced
        if record.metadata.get("artifact", {}).get("name", "").startswith("dora_fx")
    }
    assert list(artifacts) == ["dora_fx_before", "dora_fx_after"]
    calls = [artifacts[name].count("marker_dora_linear(") for name in ("dora_fx_before", "dora_fx_after")]
    assert calls == [1, 0]
