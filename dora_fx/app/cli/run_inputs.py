"""Where the base and the data of `dora-fx finetune` are on this node: paths, or files of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dora_fx.app.bases import resolve_base
from dora_fx.app.data import locate_data
from dora_fx.app.errors import UserError
from dora_fx.app.hub import Kind, pinned_name
from dora_fx.app.options import FinetuneOptions, HubName, hub_name_maybe, local_path_and_part
from dora_fx.app.runs import Display, Ranks
from dora_fx.files import listed

_KINDS: Mapping[str, Kind] = {"base": "model", "data": "dataset"}


def with_commits(options: FinetuneOptions, ranks: Ranks) -> FinetuneOptions:
    """Return options with the commits that names on the hub have on rank 0, since a branch may move meanwhile.

    Raises:
        UserError: on every rank: there is no such repository, or a name is a path on one rank and not on another.
    """
    found = json.loads(ranks.meeting.from_first(_names_with_commits, options))
    return ranks.together(_adopt, options, found)


def _names_with_commits(options: FinetuneOptions) -> str:
    names: dict[str, tuple[str, str | None]] = {}
    for option, kind in _KINDS.items():
        if (name := getattr(options, option)) is not None:
            with saying_where(options, option):
                names[option] = name, pinned_name(f"--{option}", kind, name)
    return json.dumps(names)


def _adopt(options: FinetuneOptions, of_first: Mapping[str, tuple[str, str | None]]) -> FinetuneOptions:
    adopted: dict[str, Any] = {}
    for option in _KINDS:
        name, with_commit = of_first.get(option, (None, None))
        own = getattr(options, option)
        if own != name:
            raise UserError(f"--{option}: found {own}, but {name} on rank 0; expected the same on every rank")
        if with_commit is not None:
            adopted[option] = with_commit
    return replace(options, **adopted)


def files_of_data(options: FinetuneOptions, display: Display, ranks: Ranks) -> Sequence[Path]:
    """Return the files of the data, downloaded by one rank of each node; raise UserError if that fails on a rank."""
    if options.data is None:
        return ()
    with saying_where(options, "data"):
        is_on_hub = hub_name_maybe(options.data) is not None
        files = (ranks.node_first if is_on_hub else ranks.together)(locate_data, options.data, display)
    if is_on_hub or local_path_and_part(options.data)[1] is not None:
        display.say(f"files of {options.data}: {listed([file.name for file in files])}")
    return files


def path_of_base(options: FinetuneOptions, display: Display, ranks: Ranks) -> Path:
    """Return the path of the base, downloaded by one rank of each node; raise UserError if that fails on a rank."""
    if options.base == "smollm2":
        return ranks.main_first(resolve_base, options.base, display)
    with saying_where(options, "base"):
        if hub_name_maybe(options.base) is not None:
            return ranks.node_first(resolve_base, options.base, display, not options.show_sample)
        return ranks.together(resolve_base, options.base, display)


@contextlib.contextmanager
def saying_where(options: FinetuneOptions, name: str) -> Iterator[None]:
    """Add a hint to the errors of a resumed run: how to name a file that was moved since it was started."""
    try:
        yield
    except UserError as error:
        if options.resume is None:
            raise
        raise UserError(
            f"{error}; if it was moved since the run was started, give its new path with --{name}"
        ) from error


def name_of_run(data: str) -> str:
    """Return the name that a run folder gets by its data."""
    on_hub = HubName.parse_maybe(data)
    name = Path(data).stem if on_hub is None else on_hub.repository.rpartition("/")[2]
    return name.replace(":", "-")
