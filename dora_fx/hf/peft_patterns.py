"""Names and regular expressions in a PEFT configuration, which say what layers an option is for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_fx.models import LM_HEAD

_ALL_LINEAR = "all-linear"
# A layer's number, as PEFT finds it.
_FIRST_NUMBER = r".*?\.[^.]*\.(?P<number>\d+)\."
_NUMBER = r"(?:^|.*?\.){name}\.(?P<number>\d+)\."


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole path, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(_at_the_end(pattern), path):
            return value
    return default


def is_target(config: Mapping[str, Any], path: str) -> bool | None:
    """PEFT's rule for the layers that a checked config adapts; None where it names none, and PEFT has defaults."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if targets is None:
        return None
    if excluded and (re.fullmatch(excluded, path) if isinstance(excluded, str) else _is_named(excluded, path)):
        return False
    if isinstance(targets, str):
        return path != LM_HEAD if targets.lower() == _ALL_LINEAR else re.fullmatch(targets, path) is not None
    # PEFT numbers the layers of a name's end alone, not those of a whole path.
    if path in targets or not _is_named(targets, path):
        return path in targets
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    return _layer_number(config.get("layers_pattern"), path) in (layers if isinstance(layers, list) else [layers])


def _is_named(names: Sequence[str], path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _layer_number(names: str | Sequence[str] | None, path: str) -> int | None:
    """The number in a path after one of the names, or the first after any; None where there is none."""
    patterns = [_NUMBER.format(name=name) for name in _listed(names)] or [_FIRST_NUMBER]
    found = next(filter(None, (re.match(pattern, path) for pattern in patterns)), None)
    return None if found is None else int(found["number"])


def _listed(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) and names else names or []


def check_patterns(file: Path, config: Mapping[str, Any]) -> None:
    """Check the kinds of the options that name layers, and that their expressions are regular ones.

    Raises:
        ValueError: one is not; the message names the file, the option and what was found.
    """
    expressions: list[tuple[str, str, str]] = []
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        found = config.get(option)
        if not isinstance(found, str | list | None) or not all(isinstance(name, str) for name in found or ()):
            raise ValueError(f"{file}: {option} is {found!r}, expected a list of names, or a regular expression")
        if option == "layers_pattern":
            expressions += [(option, name, _NUMBER.format(name=name)) for name in _listed(found)]
        elif isinstance(found, str):
            expressions.append((option, found, found))
    _check_layers(file, config)
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{file}: {option} is {patterns!r}, expected an object of patterns and numbers")
        expressions += [(option, pattern, _at_the_end(pattern)) for pattern in patterns]
    for option, found, expression in expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{file}: {option} has {found!r}, expected a regular expression ({error})") from error


def _check_layers(file: Path, config: Mapping[str, Any]) -> None:
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise ValueError(f"{file}: layers_to_transform is {layers!r}, expected a number of a layer or a list of them")
    if layers is not None and isinstance(config.get("target_modules"), str):
        raise ValueError(
            f"{file}: layers_to_transform is {layers!r} beside target_modules as an expression, which PEFT refuses; "
            "expected it unset"
        )
    if config.get("layers_pattern") and layers is None:
        raise ValueError(f"{file}: layers_pattern is set and layers_to_transform is not, expected both or none")


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
