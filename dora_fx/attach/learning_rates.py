"""Learning rates of their own for B and the magnitudes (LoRA+, arXiv 2402.12354), in an optimizer's own groups.

A trains at the learning rate itself; B at `loraplus_lr_ratio` and the magnitudes at `magnitude_lr_ratio` times as much.
PEFT's `create_loraplus_optimizer` has one ratio for both. Schedulers keep the ratios: torch's start from each group's
rate, Megatron's goes between the bounds of each group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import nn

from dora_fx.attach.matching import adapted_layers
from dora_fx.function import ADAPTER_TENSORS
from dora_fx.megatron import Model, chunks_of, walk

logger = logging.getLogger(__name__)


def parameter_groups(
    model: Model,
    lr: float | None = None,
    *,
    weight_decay: float | None = None,
    loraplus_lr_ratio: float = 1.0,
    magnitude_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a model's adapters as groups for a torch optimizer: A, B and the magnitudes.

        groups = dora_fx.parameter_groups(model, lr=1e-4, loraplus_lr_ratio=16)
        torch.optim.AdamW(groups, weight_decay=0.1)

    An argument that is None is left to the optimizer (AdamW decays by 0.01 by default); one that is given overrides the
    optimizer's, as in any group of torch's. Magnitudes are never decayed: W0 is in them, and decay would pull the
    adapted weight to zero and not to the base. PEFT decays them like A and B, Megatron decays nothing that has one
    dimension.

    Every rank gets its own shards, and the same three groups, of which some may be empty on a pipeline stage. A warning
    names trainable parameters outside adapters, which are in none of them.

    Args:
        model: an adapted model, or a list or a tuple of its chunks, bare or wrapped.
        lr: of A; may be left to the optimizer where all ratios are 1.
        weight_decay: of A and B.
        loraplus_lr_ratio, magnitude_lr_ratio: learning rates of B and of the magnitudes over that of A.

    Raises:
        ValueError: a ratio is not a positive finite number, a rate or a decay is negative or not finite, or there is no
            rate that a ratio could multiply.
    """
    ratios = _ratios(loraplus_lr_ratio, magnitude_lr_ratio)
    for argument, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{argument}: found {value!r}, expected a finite number of at least 0")
    if lr is None and any(ratio != 1.0 for ratio in ratios.values()):
        raise ValueError("lr: found None, expected the learning rate that the ratios multiply")
    chunks = chunks_of(model)
    adapters = [named.module.adapter for _, named in adapted_layers(chunks)]
    groups = []
    for name, ratio in ratios.items():
        parameters = [adapter.get_parameter(name) for adapter in adapters]
        group: dict[str, Any] = {"params": [parameter for parameter in parameters if parameter.requires_grad]}
        if lr is not None:
            group["lr"] = lr * ratio
        decay = 0.0 if name == "weight_magnitude" else weight_decay
        if decay is not None:
            group["weight_decay"] = decay
        groups.append(group)
    _warn_of_others(chunks, {id(parameter) for group in groups for parameter in group["params"]})
    return groups


def _warn_of_others(chunks: Sequence[nn.Module], in_groups: set[int]) -> None:
    others = [
        f"{named.whole_path}.{name}".lstrip(".")
        for chunk in chunks
        for named in walk(chunk)
        for name, parameter in named.module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in in_groups
    ]
    if others:
        logger.warning(
            "parameter_groups: found %d trainable parameters outside adapters, which are in no group and would not be "
            "trained: %s; add a group for them, or freeze them",
            len(others),
            ", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
        )


def config_overrides(
    config: OptimizerConfig, *, loraplus_lr_ratio: float = 1.0, magnitude_lr_ratio: float = 1.0
) -> dict[ParamKey, ParamGroupOverride]:
    """Return such groups for Megatron's optimizers: its standard overrides, with learning rates and their bounds.

        overrides = dora_fx.config_overrides(config, loraplus_lr_ratio=16)
        optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)

    `config.weight_decay` is that of A and B. Megatron's standard overrides turn it off for all that has one dimension,
    magnitudes among it, by a multiplier that its scheduler alone applies, as it alone applies bounds of rates; here
    both hold without a scheduler too.

    Args:
        config: of the optimizer, with `lr` and perhaps `min_lr` for A.
        loraplus_lr_ratio, magnitude_lr_ratio: as in `parameter_groups`.

    Raises:
        ValueError: a ratio is not a positive finite number, or the config has no `lr`.
    """
    ratios = _ratios(loraplus_lr_ratio, magnitude_lr_ratio)
    overrides: dict[ParamKey, Any] = {
        key: {**override, "weight_decay": 0.0} if override.get("wd_mult") == 0.0 else override
        for key, override in get_standard_config_overrides(config).items()
    }
    if config.lr is None:
        raise ValueError("OptimizerConfig.lr: found None, expected the learning rate that the ratios multiply")
    for name, ratio in ratios.items():
        if ratio == 1.0:
            continue
        # Megatron does not multiply by `lr_mult`, but distinguishes the groups of a checkpoint by it.
        override = {"lr": config.lr * ratio, "max_lr": config.lr * ratio, "lr_mult": ratio}
        if config.min_lr is not None:
            override["min_lr"] = config.min_lr * ratio
        overrides[ParamKey(name=f"*.adapter.{name}")] = override
    return overrides


def _ratios(loraplus_lr_ratio: float, magnitude_lr_ratio: float) -> dict[str, float]:
    """Return the ratio of each tensor of an adapter."""
    for name, found in (("loraplus_lr_ratio", loraplus_lr_ratio), ("magnitude_lr_ratio", magnitude_lr_ratio)):
        if not math.isfinite(found) or found <= 0:
            raise ValueError(f"{name}: found {found!r}, expected a positive finite number")
    return dict(zip(ADAPTER_TENSORS, (1.0, loraplus_lr_ratio, magnitude_lr_ratio), strict=True))
