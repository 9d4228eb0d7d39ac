"""Run each layer on a few rows when it is attached, and compare its output with what its `LinearSpec` describes.

    layer(x)    compared with    W0 x + bias, behind the norm and between the collectives of its layout

DoRA's norms, merging and export assume that W0 is all that a layer does to its input. With a class that does more, a
replaced forward, or a kind that describes its layers wrongly, another function would be trained without an error. The
comparison with the formula, run without a low-rank product, shows that before anything is changed.

The layer's forward is run on a copy of its attributes and buffers, without its hooks. Hooks are the user's: what they
make of an output stays as it is, since a layer with hooks is called with them while its adapter is on.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dora_fx.attach.plan import PlannedSite
from dora_fx.cache import have_no_values
from dora_fx.function import (
    BaseWeight,
    RowScale,
    SiteOperands,
    StoredParameters,
    adapted_linear,
    norm_dtype,
    tensors_of,
)
from dora_fx.ranks import has_other_ranks, raise_on_every_rank_of_model

logger = logging.getLogger(__name__)

# Tokens per tensor-parallel rank: with this many no row's output is near zero for all of them.
_TOKENS = 8


def try_layers(sites: Sequence[PlannedSite]) -> None:
    """Compare what each layer computes with what its kind describes; changes nothing, draws from no generator of torch.

    Every rank calls it, with the same layers as the other ranks of its tensor-parallel groups: the layers run their
    collectives. A layer that cannot be called is left out, and its kind named in the log once.

    Raises:
        ValueError: on every rank, naming the path of a layer that computes another function, and by how much.
    """
    problems = [_problem_maybe(site) for site in sites]
    groups: dict[str, dist.ProcessGroup] = {
        site.spec.tp_group_name: site.spec.tp_group
        for site in sites
        if site.spec.tp_group_name and site.spec.tp_group is not None
    }
    raise_on_every_rank_of_model(next((found for found in problems if found), None), groups.values())


def _problem_maybe(site: PlannedSite) -> str | None:
    spec, name = site.spec, type(site.linear).__name__
    if have_no_values(*tensors_of(site.weight)):
        return None
    if spec.tp_group_name and not has_other_ranks(spec.tp_group):
        logger.info("%s: not tried, as its process group has no other ranks", site.path)
        return None
    if (reason := spec.kind.trial_problem_maybe(site.linear)) is not None:
        _say_once(name, reason)
        return None
    device = site.weight.device
    on_device: dict[str, Any] = {"devices": [device], "device_type": device.type} if device.type != "cpu" else {}
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(**(on_device or {"devices": []})),
    ):
        x = _rows(site)
        try:
            found = _call(site, x)
        except Exception as error:
            _say_once(name, f"{type(error).__name__}: {error}")
            return None
        try:
            expected = _run_formula(site, x)
        except RuntimeError as error:
            return f"{site.path}: found a {name} that runs and cannot be computed as its kind describes it: {error}"
        return _difference_maybe(site, x, found, expected)


def _rows(site: PlannedSite) -> torch.Tensor:
    """Return normally distributed input `[tp, _TOKENS, in]`, which differs between ranks where the layout shards it.

    Of a grouped layer `[tokens, in]`, with `_TOKENS` for each expert.
    """
    layout, tp_group = site.spec.layout, site.spec.tp_group
    features = site.weight.shape[1] * (site.spec.tp_size if layout.enter == "split_features" else 1)
    is_whole = layout.enter in ("copy", "split_features")
    seed = 0 if is_whole or tp_group is None else tp_group.rank()
    generator = torch.Generator().manual_seed(seed)
    weights = site.spec.expert_weights
    shape = (site.spec.tp_size, _TOKENS) if weights is None else (len(weights) * _TOKENS,)
    rows = torch.randn(*shape, features, generator=generator)
    return rows.to(device=site.weight.device, dtype=site.weight.dtype)


def _call(site: PlannedSite, x: torch.Tensor) -> Any:
    if site.spec.expert_weights is not None:
        output, *_ = _without_hooks(site.linear).forward(x, [_TOKENS] * len(site.spec.expert_weights))
        return output
    arguments = {"weight": site.weight} if site.spec.weight is None else {}
    linear = _without_hooks(site.linear)
    site.spec.kind.prepare(linear)
    return linear.forward(x, **arguments)


def _without_hooks(linear: nn.Module) -> nn.Module:
    """Return a copy of a layer with the same parameters, but attributes and buffers that its forward may change."""
    copied = copy.copy(linear)
    for name, value in vars(copied).items():
        if isinstance(value, (list, dict, set)):
            vars(copied)[name] = copy.copy(value)
    for name, buffer in copied._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    return copied


def _run_formula(site: PlannedSite, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Run the formula with factors of rank zero and a scale of one; return all that the layer should return."""
    spec, weight = site.spec, site.weight
    if spec.expert_weights is not None:
        return _products_of_experts(site, x)
    of_weight: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    lora_a, lora_b = torch.zeros(0, weight.shape[1], **of_weight), torch.zeros(weight.shape[0], 0, **of_weight)
    one = torch.ones(1, dtype=norm_dtype(weight.dtype), device=weight.device)
    scale = RowScale(delta=torch.zeros_like(one), grad_gain=one, grad_scale=one)
    stored = StoredParameters(
        weight=weight,
        base_norm_sq=None,
        lora_a=lora_a,
        lora_b=lora_b,
        magnitude=one,
        scaling=one,
        dropout_threshold=None,
        dropout_rescale=None,
        layout_name=spec.layout.name,
        tp_group=spec.tp_group_name,
        dtype=weight.dtype,
    )
    output = adapted_linear(
        x,
        stored,
        SiteOperands(lora_a, lora_b, one, scale),
        spec.kind.added_bias(site.linear),
        dtype=weight.dtype,
        input_norm=spec.input_norm,
    )
    return (output, *(spec.kind.returned_beside_output(site.linear) or ()))


def _products_of_experts(site: PlannedSite, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    spec = site.spec
    weights = spec.expert_weights or ()
    output = torch.cat([own @ weight.t() for own, weight in zip(x.split(_TOKENS), weights, strict=True)])
    bias = spec.kind.added_bias(site.linear)
    if bias is not None:
        output = output + bias.repeat_interleave(_TOKENS, 0)
    return (output,)


def _difference_maybe(
    site: PlannedSite, x: torch.Tensor, found: Any, expected: tuple[torch.Tensor | None, ...]
) -> str | None:
    """Return a message where a layer's output differs from the formula's by more than rounding, else None."""
    name = type(site.linear).__name__
    returned = found if isinstance(found, tuple) else (found,)
    beside = site.spec.kind.returned_beside_output(site.linear)
    shapes, expected_shapes = [[_shape(value) for value in values] for values in (returned, expected)]
    if isinstance(found, tuple) != (beside is not None) or shapes != expected_shapes:
        return f"{site.path}: found a {name} that returns {shapes}, expected {expected_shapes} as its kind describes it"
    pairs = zip(returned, expected, strict=True)
    errors = [_relative_error(value, other) for value, other in pairs if value is not None and other is not None]
    bound = _rounding(site, x)
    if max(errors) <= bound:
        return None
    return (
        f"{site.path}: found a {name} whose outputs are off W0 x + bias by up to {max(errors):.1e} of their size on "
        f"rows that were tried, expected {bound:.1e} at most: norms, merging and export take its weight for all of it. "
        "Give it a forward that computes that, or exclude it"
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of an output feature, over the largest value that it has for any token.

    What overflows counts as zero, on both sides.
    """
    # Smaller numbers are off by more than their dtype's relative rounding.
    tiny = torch.finfo(expected.dtype).smallest_normal
    found, expected = (
        torch.nan_to_num(value.double().reshape(-1, value.shape[-1]), nan=0.0, posinf=0.0, neginf=0.0)
        for value in (found, expected)
    )
    differences, size = (found - expected).abs().amax(0), expected.abs().amax(0) + tiny
    return float(torch.where(differences == 0, 0.0, differences / size).max())


def _rounding(site: PlannedSite, x: torch.Tensor) -> float:
    """Return a bound of an output's relative error: random walks of roundings, with room for both sides to be off.

    Sums over the input are accumulated in float32 at least. In 16 bits the norm's output, the product, the sum over the
    ranks and that with the bias are each rounded to the dtype.
    """
    dtype = site.weight.dtype
    sums = site.spec.in_features**0.5 * torch.finfo(norm_dtype(dtype)).eps
    others = (3 + site.spec.tp_size) ** 0.5 * max(
        torch.finfo(dtype).eps, _product_eps(site.weight), site.spec.kind.product_eps(site.linear, x)
    )
    return 4.0 * (sums + others)


def _product_eps(weight: BaseWeight) -> float:
    """Return the rounding of the operands of a product, where it is coarser than their dtype's."""
    if weight.dtype != torch.float32:
        return 0.0
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        return torch.finfo(torch.bfloat16).eps
    # TF32 has 10 bits, and Transformer Engine uses it whatever torch's setting is.
    return 2.0**-10 if weight.device.type == "cuda" or precision == "high" else 0.0


@functools.cache
def _say_once(name: str, reason: str) -> None:
    logger.warning(
        "%s: cannot be called with a few rows when it is attached, so nothing shows that it computes W0 x + bias (%s)",
        name,
        reason,
    )
