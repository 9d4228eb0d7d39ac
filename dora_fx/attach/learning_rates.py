"""Learning rates of their own for B and the magnitudes (LoRA+, arXiv 2402.12354), in an optimizer's own groups.

A trains at the learning rate itself; B at `loraplus_lr_ratio` and the magnitudes at `magnitude_lr_ratio` times as much.
PEFT's `create_loraplus_optimizer` has one ratio for both. Schedulers keep the ratios: torch's start from each group's
rate, Megatron's goes between the bounds of each group.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from dora_fx.attach.matching import adapted_layers
from dora_fx.function.placement import ADAPTER_TENSORS
from dora_fx.megatron.wrappers import Model, chunks_of


def parameter_groups(
    model: Model,
    lr: float,
    *,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
    magnitude_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model's adapters as groups for a torch optimizer: A, B and the magnitudes.

        torch.optim.AdamW(dora_fx.parameter_groups(model, lr=1e-4, loraplus_lr_ratio=16))

    Every rank gets its own shards, and the same three groups, of which some may be empty on a pipeline stage.

    Args:
        model: an adapted model, or a list or a tuple of its chunks, bare or wrapped.
        lr: of A.
        weight_decay: of A and B; magnitudes are not decayed.
        loraplus_lr_ratio, magnitude_lr_ratio: learning rates of B and of the magnitudes over that of A.

    Raises:
        ValueError: a ratio is not a positive finite number.
    """
    ratios = _ratios(loraplus_lr_ratio, magnitude_lr_ratio)
    adapters = [named.module.adapter for _, named in adapted_layers(chunks_of(model))]
    groups = []
    for name, ratio in ratios.items():
        parameters = [adapter.get_parameter(name) for adapter in adapters]
        groups.append(
            {
                "params": [parameter for parameter in parameters if parameter.requires_grad],
                "lr": lr * ratio,
                "weight_decay": 0.0 if name == "weight_magnitude" else weight_decay,
            }
        )
    return groups


def config_overrides(
    config: OptimizerConfig, *, loraplus_lr_ratio: float = 1.0, magnitude_lr_ratio: float = 1.0
) -> dict[ParamKey, ParamGroupOverride]:
    """The same for Megatron's optimizers: its standard overrides, and the bounds of the groups' learning rates.

        overrides = dora_fx.config_overrides(config, loraplus_lr_ratio=16)
        optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides)

    Args:
        config: of the optimizer, with `lr` and perhaps `min_lr` for A.
        loraplus_lr_ratio, magnitude_lr_ratio: as in `parameter_groups`.

    Raises:
        ValueError: a ratio is not a positive finite number, or the config has no `lr`.
    """
    ratios = _ratios(loraplus_lr_ratio, magnitude_lr_ratio)
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    if config.lr is None:
        raise ValueError("OptimizerConfig.lr: found None, expected the learning rate that the ratios multiply")
    for name, ratio in ratios.items():
        if ratio == 1.0:
            continue
        # Megatron multiplies by no `lr_mult`, but tells the groups of a checkpoint apart by it.
        override = {"max_lr": config.lr * ratio, "lr_mult": ratio}
        if config.min_lr is not None:
            override["min_lr"] = config.min_lr * ratio
        overrides[ParamKey(name=f"*.adapter.{name}")] = override
    return overrides


def _ratios(loraplus_lr_ratio: float, magnitude_lr_ratio: float) -> dict[str, float]:
    """The ratio of each tensor of an adapter."""
    for name, found in (("loraplus_lr_ratio", loraplus_lr_ratio), ("magnitude_lr_ratio", magnitude_lr_ratio)):
        if not math.isfinite(found) or found <= 0:
            raise ValueError(f"{name}: found {found!r}, expected a positive finite number")
    return dict(zip(ADAPTER_TENSORS, (1.0, loraplus_lr_ratio, magnitude_lr_ratio), strict=True))
