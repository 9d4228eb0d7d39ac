"""The files that `--data` names: local ones, or those of a data set on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dora_fx.app.data.dataset_splits import split_files
from dora_fx.app.data.records import SUFFIXES
from dora_fx.app.errors import UserError
from dora_fx.app.hub import HubRepository
from dora_fx.app.options import HubName, hub_name_maybe, local_path_and_part
from dora_fx.app.runs import Display, parse_plain_yaml
from dora_fx.files import read_regular, reading

CARD = "README.md"
_MOST_BYTES = 8 << 20
_HEAD = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# Of the card's head this key alone: others, such as the names of a thousand labels, take long to parse.
_CONFIGS = re.compile(r"^configs:.*\n(?:(?:[ \t#-].*)?\r?\n)*", re.MULTILINE)


def locate_data(data: str, display: Display) -> Sequence[Path]:
    """Return the files of the data, or the one file or folder that they are.

    Args:
        data: a path; `folder:part`, where the folder has the files of a repository; or a name on the hub.
        display: shows a download.

    Raises:
        UserError: there is no such file or data set, it has no such part, or it cannot be downloaded.
    """
    if (on_hub := hub_name_maybe(data)) is not None:
        return _on_hub(on_hub, display)
    path, part = local_path_and_part(data)
    if part is not None:
        there = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        card = path / CARD if CARD in there else None
        return [path / name for name in _files_of_split(data, there, part, card)]
    if not path.exists() and path.suffix not in SUFFIXES:
        raise UserError(
            f"--data {data}: no such file or directory; expected one, or a data set of the Hugging Face hub as "
            "org/name, org/name:split or org/name@revision:split"
        )
    return [path]


def _on_hub(name: HubName, display: Display) -> Sequence[Path]:
    repository = HubRepository("--data", "dataset", name).pinned()
    there = repository.files()
    # A file that is named by itself needs no card, which may not be in the cache.
    is_card_needed = CARD in there and name.part not in there
    card = repository.fetch([CARD], display) / CARD if is_card_needed else None
    files = _files_of_split(str(name), list(there), name.part, card)
    folder = repository.fetch(files, display)
    return [folder / file for file in files]


def _files_of_split(data: str, names: Sequence[str], part: str | None, card: Path | None) -> list[str]:
    try:
        configs = None if card is None or part in names else _configs(card)
        return split_files(names, part, configs, SUFFIXES)
    except (ValueError, TypeError, re.error) as error:
        # A card is somebody else's, and may have anything in the place of names and patterns.
        raise UserError(f"--data {data}: {error}") from error


def _configs(card: Path) -> object:
    """Return what the card of a data set says under `configs`, None if it says nothing.

    Raises:
        ValueError: it cannot be read.
    """
    with reading(card, "name a file of the data set behind a colon, which needs no card"):
        text = read_regular(card, at_most=_MOST_BYTES, follow_link=True).decode("utf-8", errors="replace")
        head = _HEAD.match(text)
        block = _CONFIGS.search(head[1]) if head else None
        return None if block is None else parse_plain_yaml(block[0], f"{card}, configs").get("configs")
