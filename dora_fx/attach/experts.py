"""Checks of the experts that a configuration adapts, and of what Megatron does around them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from dora_fx.attach.matching import matches, of_all_experts
from dora_fx.attach.plan import PlannedSite
from dora_fx.attach.settings import DoRASettings
from dora_fx.megatron import walk
from dora_fx.modules import DoRALinear, is_grouped_mlp, refused_setting_of_experts_maybe
from dora_fx.ranks import check_same_settings, gather_objects

logger = logging.getLogger(__name__)

_ALIKE = (
    "found dim and alpha {} and {}, expected the same for all experts of a layer, which are one tensor in checkpoints"
)
_TRIED_DISPATCHERS = ("allgather", "alltoall")


def check_experts(settings: DoRASettings, chunks: Sequence[nn.Module], new: Sequence[PlannedSite]) -> None:
    """Check the experts among the layers to wrap, on this rank alone.

    Raises:
        ValueError: experts of a layer would get adapters of several ranks or alphas, or Megatron has a setting with
            which they would not compute or train what they should.
        TypeError: a target means the experts of a class that has no module for each of their layers.
    """
    _check_alike(new)
    paths = [site.path for site in new if site.spec.experts is not None]
    for chunk in chunks:
        for named in walk(chunk, DoRALinear):
            if is_grouped_mlp(named.module):
                _check_not_meant(settings, named.whole_path)
            is_adapted = any(path.startswith(f"{named.whole_path}.") for path in paths)
            if isinstance(named.module, MoELayer) and is_adapted:
                _check_config(named.whole_path, named.module.config)


def check_same_on_expert_ranks(settings: Mapping[str, Any], new: Iterable[PlannedSite]) -> None:
    """Raise ValueError if ranks that hold other experts of a layer have other settings; every rank calls it."""
    group = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    if group is None or group.size() == 1:
        return
    check_same_settings(settings, group, "expert-parallel")
    own = {of_all_experts(site.path): (site.dim, site.alpha) for site in new if site.spec.experts is not None}
    # A rank may have none of the experts that are adapted.
    known: dict[str, tuple[int, float]] = {}
    for path, value in (pair for of_rank in gather_objects(own, group) for pair in of_rank.items()):
        if known.setdefault(path, value) != value:
            raise ValueError(f"{path}: {_ALIKE.format(value, known[path])}")


def _check_alike(new: Iterable[PlannedSite]) -> None:
    first: dict[str, PlannedSite] = {}
    for site in new:
        known = first.setdefault(of_all_experts(site.path), site)
        if (known.dim, known.alpha) != (site.dim, site.alpha):
            raise ValueError(f"{site.path}: {_ALIKE.format((site.dim, site.alpha), (known.dim, known.alpha))}")


def _check_not_meant(settings: DoRASettings, path: str) -> None:
    for name in ("linear_fc1", "linear_fc2"):
        layer = f"{path}.{name}"
        if any(matches(pattern, layer) for pattern in settings.exclude_modules):
            continue
        for pattern in settings.target_modules:
            if pattern == "all-linear" or matches(pattern, layer):
                raise TypeError(
                    f"{path}: target {pattern!r} means experts, and found a GroupedMLP, which has no linear layers; "
                    f"expected a TEGroupedMLP or a SequentialMLP. Exclude '{path}.*' to leave them alone"
                )


def _check_config(path: str, config: Any) -> None:
    if (problem := refused_setting_of_experts_maybe(config)) is not None:
        raise ValueError(f"{path}: found adapted experts with {problem}")
    dispatcher = config.moe_token_dispatcher_type
    if dispatcher not in _TRIED_DISPATCHERS:
        logger.warning(
            "%s: found the %s dispatcher of tokens, which adapted experts were not tried with; they were with %s",
            path,
            dispatcher,
            " and ".join(_TRIED_DISPATCHERS),
        )
