"""What of experts stays frozen: those that a transformers model holds as parameters, and the bias of a router.

Experts that are parameters, `[E, out, in]` or `[E * out, in]`, are no linear layers. A target that means them is
refused, because it may name dense layers too, and nothing would tell that they alone train.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from dora_fx.attach.layer_names import projections_of
from dora_fx.attach.matching import ALL_LINEAR, matches
from dora_fx.attach.routers import modules_of_routers
from dora_fx.megatron import unwrap, walk
from dora_fx.modules import DoRALinear, is_grouped_mlp, looks_like_linear

logger = logging.getLogger(__name__)

_NAME = "expert"


def fused_experts(chunks: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the module, the path and the parameter of all experts of each layer that holds them in one.

    Several matrices that are one parameter are taken for experts, whatever they are called; a single matrix where a
    name says so. Positions, which are `[1, tokens, hidden]`, and kernels of convolutions are none.
    """
    for chunk in chunks:
        of_routers = modules_of_routers(chunk)
        for named in walk(chunk, DoRALinear):
            module = named.module
            if looks_like_linear(module) or isinstance(module, (nn.Embedding, _ConvNd)) or module in of_routers:
                continue
            dims = (2, 3) if _NAME in f"{named.whole_path} {type(module).__name__}".lower() else (3,)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() in dims and min(parameter.shape) > 1 and "bias" not in name:
                    yield module, f"{named.whole_path}.{name}", parameter


def check_fused_experts(chunks: Sequence[nn.Module], targets: Sequence[str], excluded: Sequence[str]) -> None:
    """Raise TypeError if a target names experts that are parameters, unless they are excluded.

    `all-linear` names linear layers, which they are not. `check_experts` refuses those of Megatron's GroupedMLP, by the
    names that layers have in the classes which Megatron has in its place.
    """
    for module, path, parameter in fused_experts(chunks):
        if is_grouped_mlp(module) or any(matches(pattern, path) for pattern in excluded):
            continue
        for target in targets:
            if target != ALL_LINEAR and _means(target, path):
                shape = "x".join(map(str, parameter.shape))
                number = f"{parameter.shape[0]} " if parameter.dim() == 3 else ""
                raise TypeError(
                    f"{path}: target {target!r} names a parameter of {shape}, which holds {number}experts, expected a "
                    "linear layer: experts of a transformers model stay frozen. Adapt them in a Megatron model "
                    "(dora_fx.models.build_gpt_model), where each one has layers, or leave them out here: "
                    f"exclude_modules=['*.{path.split('.')[-2]}.*']"
                )


def _means(target: str, path: str) -> bool:
    """Return whether a target names a parameter, or projections that it holds beside others."""
    if matches(target, path):
        return True
    before, dot, last = target.rpartition(".")
    name = path.rpartition(".")[2]
    # A wildcard may be a part of the last name.
    wanted = projections_of(last.strip("*"))
    # Files of adapters name experts one by one.
    is_part = bool(wanted) and wanted <= projections_of(name)
    return is_part and (_NAME in before or matches(f"{before}{dot}{last.replace(last.strip('*'), name)}", path))


def text_on_fused_experts(chunks: Sequence[nn.Module]) -> str | None:
    """Return what a report says of such experts; None for a model without any."""
    counts: dict[str, int] = {}
    for _, path, parameter in fused_experts(chunks):
        kind = ".".join("*" if part.isdigit() else part for part in path.split("."))
        shown = f"{kind} ({'x'.join(map(str, parameter.shape))})"
        counts[shown] = counts.get(shown, 0) + 1
    if not counts:
        return None
    listed = ", ".join(f"{count} x {shown}" for shown, count in counts.items())
    return f"experts are parameters here, not layers, and stay frozen: {listed}"


def freeze_router_bias(chunk: nn.Module) -> None:
    """Let Megatron leave the biases alone by which routers choose experts: no gradient moves them, but each step does.

    They are the base's. Files of adapters, and merged weights, would not contain the changed biases.
    """
    config: Any = getattr(unwrap(chunk), "config", None)
    rate = getattr(config, "moe_router_bias_update_rate", 0.0)
    if getattr(config, "moe_router_enable_expert_bias", False) and rate:
        config.moe_router_bias_update_rate = 0.0
        logger.warning(
            "moe_router_bias_update_rate: found %g, set to 0: the routers' biases are the base's, which stays frozen",
            rate,
        )
