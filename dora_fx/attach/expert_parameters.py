"""Refuse targets that mean experts which are parameters of one module, and not linear layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dora_fx.attach.matching import ALL_LINEAR, matches
from dora_fx.attach.settings import DoRASettings
from dora_fx.megatron import walk

# megatron-core 0.16's module, whose `weight1` and `weight2` are what these layers are elsewhere.
_HOLDER = ("megatron.core.transformer.moe.experts", "GroupedMLP")
_LAYERS = ("linear_fc1", "linear_fc2")


def check_experts_are_layers(settings: DoRASettings, chunks: Iterable[nn.Module]) -> None:
    """Raise TypeError if a target would name layers of experts that a module holds as parameters.

    The target may name other layers too, so that nothing would tell that experts stay without adapters.
    """
    for chunk in chunks:
        for named in walk(chunk):
            cls = type(named.module)
            if (cls.__module__, cls.__qualname__) != _HOLDER:
                continue
            paths = [f"{named.whole_path}.{name}" for name in _LAYERS]
            meant = [path for path in paths if _is_target(settings, path)]
            if meant:
                raise TypeError(
                    f"{named.whole_path}: found a {cls.__name__}, which holds its experts as parameters (weight1, "
                    f"weight2), expected layers that targets can name, such as {meant[0]!r}; build the model with "
                    "TEGroupedMLP or SequentialMLP, or exclude those paths"
                )


def _is_target(settings: DoRASettings, path: str) -> bool:
    if any(matches(pattern, path) for pattern in settings.exclude_modules):
        return False
    return ALL_LINEAR in settings.target_modules or any(matches(pattern, path) for pattern in settings.target_modules)
