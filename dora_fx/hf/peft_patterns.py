"""Names and regular expressions in a PEFT configuration, which say what layers an option is for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole path, or its end after a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(_at_the_end(pattern), path):
            return value
    return default


def check_patterns(file: Path, config: Mapping[str, Any]) -> None:
    """Check the kinds of the options that name layers, and that their expressions are regular ones.

    Raises:
        ValueError: one is not; the message names the file, the option and what was found.
    """
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else []
    if not isinstance(targets, str | list | None) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: target_modules is {targets!r}, expected a list of names, or a regular expression")
    expressions = [("target_modules", targets, targets)] if isinstance(targets, str) else []
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


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
