"""YAML files of options: a run's config.yaml, and what `--config` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_fx.app.errors import UserError
from dora_fx.app.runs.yaml_file import read_yaml
from dora_fx.files import reading


def read_options_file(file: Path, flag: str | None = None) -> dict[str, Any]:
    """The options in a file, as it has them; `flag` is the option that names it, for messages.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    prefix = f"{flag} " if flag else ""
    try:
        with reading(file, "give options in YAML"):
            found = read_yaml(file)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{prefix}{file}: found a {type(found).__name__}, expected options by their names in YAML")
    return found
