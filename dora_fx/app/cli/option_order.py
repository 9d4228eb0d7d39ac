"""Orders arguments by precedence: a resumed run's options first, then files of options, then the command line."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from dora_fx.app.errors import UserError

# `dora_fx.app.runs` imports torch, which takes seconds, so only functions that open a file import it.


def options_in_order(argv: list[str]) -> list[str]:
    """Reorder arguments, as later ones win: a resumed run's config, then `--config`, then the others.

    Raises:
        UserError: a file of options cannot be read, or one source gives both `--steps` and `--epochs`.
    """
    resumed, configs, others = [], [], []
    names = {argument.partition("=")[0] for argument in argv}
    _check_one_length("the command line", {"--steps", "--epochs"} <= names)
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "--resume"):
            others.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if name == "--config":
            others += _overridden_in_file(value, names)
            configs.append(f"--config={value}")
        else:
            resumed.append(f"--config={_config_of_run(value)}")
            others.append(f"--resume={value}")
    return [*resumed, *configs, *others]


def _overridden_in_file(file: str, names: Collection[str]) -> list[str]:
    """Return `--epochs=null` if a file sets epochs and the command line sets steps, which excludes epochs."""
    # The parser reports a missing file. Files that exist are read here first, for errors that name them.
    if not os.path.exists(file):
        return []
    from dora_fx.app.runs import read_options_file

    options = read_options_file(Path(file), "--config")
    has_epochs = options.get("epochs") is not None
    _check_one_length(f"--config {file}", has_epochs and options.get("steps") is not None)
    return ["--epochs=null"] if has_epochs and "--steps" in names else []


def _config_of_run(run: str) -> Path:
    """Check a run folder, and return its file of options."""
    from dora_fx.app.runs import RunFolder

    folder = RunFolder(Path(run))
    folder.saved_config()
    return folder.config_file


def _check_one_length(place: str, has_both: bool) -> None:
    if has_both:
        raise UserError(f"--epochs: found --steps beside it in {place}, expected one of them")
