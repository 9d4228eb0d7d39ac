"""A `torch.compile` backend that keeps the graphs before and after the passes and runs the result eagerly."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._dynamo.testing import normalize_gm

from dora_fx.backend import with_refresh
from dora_fx.passes import default_passes
from dora_fx.passes.pipeline import GraphPass, run_passes


class RecordingBackend:
    """Run a pass list; `before` and `after` hold one graph per compilation."""

    def __init__(self, passes: Sequence[GraphPass] | None = None) -> None:
        self.passes = default_passes() if passes is None else list(passes)
        self.before: list[fx.GraphModule] = []
        self.after: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.before.append(copy.deepcopy(gm))
        gm = run_passes(gm, example_inputs, self.passes)
        self.after.append(gm)
        return with_refresh(gm, gm)


# What Dynamo names the operands of a site in a model whose one layer is `linear`, and what golden text calls them.
SHORT_NAMES = {
    "modules_to_wrap_parameters_weight_": "weight",
    "modules_to_wrap_parameters_bias_": "bias",
    "modules_to_wrap_parameters_layer_norm_weight_": "norm_weight",
    "modules_to_wrap_parameters_layer_norm_bias_": "norm_bias",
    "buffers_base_norm_sq_": "base_norm_sq",
    "buffers_cached_delta_": "delta",
    "buffers_cached_grad_gain_": "grad_gain",
    "buffers_cached_grad_scale_": "grad_scale",
    "buffers_cached_lora_a_": "whole_lora_a",
    "buffers_cached_lora_b_": "whole_lora_b",
    "modules_adapter_modules_linear_in_parameters_weight_": "lora_a",
    "modules_adapter_modules_linear_out_parameters_weight_": "lora_b",
    "modules_adapter_parameters_weight_magnitude_": "magnitude",
    "modules_adapter_buffers_scaling_factor_": "scaling",
    "modules_adapter_buffers_dropout_threshold_": "threshold",
    "modules_adapter_buffers_dropout_rescale_": "rescale",
}


def graph_text(gm: fx.GraphModule) -> str:
    """Readable text of a graph, the same on every supported torch and for every process group."""
    text = normalize_gm(gm.print_readable(print_output=False))
    text = re.sub(r";  .*= None", "", text)
    text = re.sub(r"[lL]_self_modules_linear_(\w+?_)(?=[\s:,).\]])", lambda name: SHORT_NAMES[name[1]], text)
    text = text.replace("l_x_", "x").replace("L_x_", "x")
    text = re.sub(r"^ *(\w+) = \1\n", "", text, flags=re.MULTILINE)
    return re.sub(r"'\d+'", "'tp'", text)
