"""Reads YAML files of options: a run's config.yaml, and the files of `--config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dora_fx.app.errors import UserError
from dora_fx.files import UnsafeFileError, read_regular, reading

_MOST_BYTES, _DEEPEST = 1 << 20, 20


def read_options_file(file: Path, flag: str | None = None) -> dict[str, Any]:
    """Read the options in a file, without checking them; `flag` is the option that names the file, for messages.

    Raises:
        UserError: the file cannot be read, or does not hold a mapping.
    """
    prefix = f"{flag} " if flag else ""
    try:
        with reading(file, "give options in YAML"):
            options = _read_yaml(file)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error
    if not isinstance(options, dict):
        raise UserError(f"{prefix}{file}: found a {type(options).__name__}, expected options by their names in YAML")
    return options


def parse_plain_yaml(text: str, where: str) -> Any:
    """Parse YAML of plain values, with a limit of depth; `where` is the file, for messages.

    Aliases (*name) are refused: each repeats a value, so that a few lines can stand for billions of values.

    Raises:
        UnsafeFileError: the text has an alias, or is nested too deeply.
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            problem = "a value given by an alias" if depth <= _DEEPEST else "values nested too deeply"
            raise UnsafeFileError(f"{where}: found {problem}, expected plain values")
    return yaml.safe_load(text)


def _read_yaml(path: Path) -> Any:
    return parse_plain_yaml(read_regular(path, at_most=_MOST_BYTES, follow_link=True).decode("utf-8"), str(path))
