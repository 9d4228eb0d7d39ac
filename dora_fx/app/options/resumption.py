"""The options that a run folder keeps, and which of them a run that goes on may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dora_fx.app.errors import UserError
from dora_fx.app.options.demo import DemoName
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.app.options.hub_name import HubName
from dora_fx.app.options.option_groups import default_of, flag_of

# What a resumed run may change: everything else decides which losses it goes through. A base and a text may have
# moved: the checkpoint has digests of both, and refuses others. Another commit of a repository is refused by its name.
# Adapters of one spec fit the layers of another, or have other names and are refused.
CHANGEABLE_ON_RESUME = frozenset(
    {"steps", "epochs", "check", "show_sample", "save_every", "eval_every", "patience", "keep", "log", "sample_tokens"}
    | {"device", "spec", "compile", "recompute", "tp", "pp", "dp", "ep", "etp", "sequence_parallel"}
    | {"base", "data"}
)


def saved_options(options: FinetuneOptions) -> dict[str, Any]:
    """Return the content of config.yaml: the options without the folder, which may be moved."""
    values = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("run", "resume")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def check_resumable(options: FinetuneOptions, saved: dict[str, Any]) -> None:
    """Raise UserError if the options would make a resumed run another run than the saved one."""
    if options.run is not None:
        raise UserError("--run: leave it out; a resumed run goes on in its own folder")
    defaults = {option.name: default_of(option) for option in dataclasses.fields(options)}
    for name, value in saved_options(options).items():
        # A version that had no such option did what its default does.
        started = saved.get(name, defaults[name])
        started = DemoName()(started) if name == "demo" else started
        if name not in CHANGEABLE_ON_RESUME and value != started:
            lacks = "" if name in saved else ", the default, as its config.yaml has no such option"
            raise UserError(
                f"{flag_of(name)}: found {value!r}, but the run to resume was started with {started!r}{lacks}"
            )
        if name in ("base", "data") and _is_other_state(str(value), str(started)):
            raise UserError(
                f"{flag_of(name)}: found {value}, but the run to resume was started with {started}; "
                f"leave {flag_of(name)} out, or give that revision"
            )


def _is_other_state(name: str, started: str) -> bool:
    """Return whether two names are of one repository on the hub, and of other revisions or parts of it."""
    ours, theirs = HubName.parse_maybe(name), HubName.parse_maybe(started)
    return ours != theirs and ours is not None and theirs is not None and ours.repository == theirs.repository
