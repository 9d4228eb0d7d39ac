"""YAML whose size and depth somebody else chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dora_fx.files import UnsafeFileError, read_regular

_MOST_BYTES, _DEEPEST = 1 << 20, 20


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of plain values; an alias (*name) repeats a value, and a few lines can make billions.

    Raises:
        UnsafeFileError: it has an alias, is nested too deeply or too large, or is no regular file.
        UnicodeDecodeError, yaml.YAMLError: it is no YAML, or has other objects in it than plain values.
        OSError: it is not there or cannot be read.
    """
    text = read_regular(path, at_most=_MOST_BYTES, follow_link=True).decode("utf-8")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            found = "a value given by an alias" if depth <= _DEEPEST else "values nested too deeply"
            raise UnsafeFileError(f"{path}: found {found}, expected plain values")
    return yaml.safe_load(text)
