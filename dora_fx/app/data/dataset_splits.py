"""The files of a data set's repository that make a split, by the conventions of the Hugging Face hub.

The card of a data set, README.md, may list its subsets and the files of their splits under `configs`. Otherwise the
names of files and folders say the split: `data/train-00000-of-00002.parquet`, `train.jsonl`, `test/part-1.csv`. Where
no name does, all files are training data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from dora_fx.files import listed, shortened

TRAIN, DEFAULT = "train", "default"
_KEYWORDS = {
    TRAIN: {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_WORDS = re.compile(r"[-._ 0-9]+")
_SHARD = re.compile(r"(?P<stem>.*?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)")
_SPLIT_OF_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
# Descriptions of data sets that lie beside them.
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])")
# Each one may try every length of a name, so that a few dozen take for ever.
_MOST_WILDCARDS = 6
_MOST_LISTED = 20

Splits = Mapping[str, Mapping[str, list[str]]]


def split_files(names: Collection[str], part: str | None, configs: object, suffixes: Collection[str]) -> list[str]:
    """Return the files of a split, in the order of their names.

    Args:
        names: of all files of the repository.
        part: a split, a subset, `subset/split`, or a file; by default the training split of the default subset.
        configs: of the data set's card, None if it has none.
        suffixes: of the files that can be read.

    Raises:
        ValueError: there is no such part, several could be meant, a file of it is missing, or none can be read.
    """
    data = _data_files(names, suffixes)
    if part is not None and part in names:
        if PurePosixPath(part).suffix not in suffixes:
            raise ValueError(f"found the file {part}, expected one of the kinds {', '.join(suffixes)}")
        return [part]
    if not data:
        raise ValueError(
            f"found no data file, expected some of the kinds {', '.join(suffixes)}; there are {listed(names)}; "
            "scripts that load a data set are not run"
        )
    splits, default = _of_card(configs, data) if configs is not None else (_of_names(data), None)
    if not _parts(splits):
        raise ValueError(
            f"README.md: found no file that its configs name; name one of those that are there, such as :{data[0]}"
        )
    subset, split = _meant(splits, default, part)
    files = sorted(set(splits[subset][split]))
    _check_one_kind(files)
    _check_shards(files)
    return files


def _data_files(names: Collection[str], suffixes: Collection[str]) -> list[str]:
    found = [name for name in sorted(names) if PurePosixPath(name).suffix in suffixes and not _is_aside(name)]
    # Licences and notes are texts beside data of other kinds.
    return [name for name in found if not name.endswith(".txt")] or found


def _is_aside(name: str) -> bool:
    *folders, file = name.split("/")
    return file in _NO_DATA or any(part.startswith((".", "__")) for part in (*folders, file))


def _of_names(data: Collection[str]) -> Splits:
    """Return the splits that names of files say, by subsets, which are the folders that say no split."""
    places = {name: _place_of(name) for name in data}
    # Where names say splits, a file whose name says none belongs to none.
    otherwise = [] if any(splits for _, splits in places.values()) else [TRAIN]
    found: dict[str, dict[str, list[str]]] = {}
    for name, (subset, splits) in places.items():
        for split in splits or otherwise:
            found.setdefault(subset, {}).setdefault(split, []).append(name)
    return found


def _place_of(name: str) -> tuple[str, list[str]]:
    """Return the subset and the splits that a name says."""
    *folders, file = name.split("/")
    of_folders = {folder: _splits_in(folder) for folder in folders}
    subset = "/".join(folder for folder in folders if not of_folders[folder] and folder != "data")
    shard = _SPLIT_OF_SHARD.fullmatch(file) if folders[-1:] == ["data"] else None
    splits = [shard["split"]] if shard else [split for found in of_folders.values() for split in found]
    return subset or DEFAULT, splits or _splits_in(PurePosixPath(file).stem)


def _splits_in(name: str) -> list[str]:
    words = set(_WORDS.split(name.lower()))
    return [split for split, keywords in _KEYWORDS.items() if words & keywords]


def _of_card(configs: object, data: Collection[str]) -> tuple[Splits, str | None]:
    """Return the splits that a card lists, by subsets, and the subset that it calls the default."""
    found: dict[str, dict[str, list[str]]] = {}
    default = None
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            raise ValueError(
                f"README.md: found {shortened(config)} in configs, expected a subset's name and data_files"
            )
        name = str(config.get("config_name", DEFAULT))
        default = name if config.get("default") is True else default
        folder = str(config.get("data_dir") or "")
        patterns = list(_patterns(config.get("data_files")))
        inside = [file for file in data if not folder or file.startswith(folder.rstrip("/") + "/")]
        if not patterns:
            # A subset that is a folder alone.
            for splits in _of_names(inside).values():
                for split, files in splits.items():
                    found.setdefault(name, {}).setdefault(split, []).extend(files)
        for split, pattern in patterns:
            matching = _matching(f"{folder.rstrip('/')}/{pattern}" if folder else pattern, data)
            found.setdefault(name, {}).setdefault(split, []).extend(matching)
    return (found, default) if found else (_of_names(data), None)


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Yield the split and the pattern of each entry of `data_files`, which has several forms."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for entry in [data_files] if isinstance(data_files, str) else data_files or []:
        split, paths = (
            (str(entry.get("split", TRAIN)), entry.get("path")) if isinstance(entry, dict) else (TRAIN, entry)
        )
        for path in [paths] if isinstance(paths, str) else paths or []:
            yield split, str(path)


def _matching(pattern: str, data: Collection[str]) -> list[str]:
    parts = _WILDCARD.split(pattern.removeprefix("./"))
    if len(parts) > 2 * _MOST_WILDCARDS + 1:
        raise ValueError(
            f"README.md: found the pattern {shortened(pattern)}, expected at most {_MOST_WILDCARDS} wildcards"
        )
    expression = re.compile("".join(map(_expression, parts)))
    return [name for name in data if expression.fullmatch(name)]


def _expression(part: str) -> str:
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if part.startswith("[") and part.endswith("]"):
        inside = part[1:-1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
        return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
    return known.get(part, re.escape(part))


def _meant(splits: Splits, default: str | None, part: str | None) -> tuple[str, str]:
    """Return the subset and the split that a part is."""
    subset, split = default, part
    if part is not None and part in splits and not any(of_subset.get(part) for of_subset in splits.values()):
        subset, split = part, None
    elif part is not None and part.rpartition("/")[0] in splits:
        subset, _, split = part.rpartition("/")
    if subset is None:
        # A split that one subset alone has needs no name of the subset.
        having = [name for name, of_subset in splits.items() if split is None or split in of_subset] or list(splits)
        subset = DEFAULT if DEFAULT in having else having[0] if len(having) == 1 else None
    if subset is not None and split is None:
        of_subset = splits[subset]
        split = TRAIN if TRAIN in of_subset else next(iter(of_subset)) if len(of_subset) == 1 else None
    if subset is None or split is None or not splits.get(subset, {}).get(split):
        raise ValueError(f"{_found(splits, part)}, expected one of {', '.join(_parts(splits)[:_MOST_LISTED])}")
    return subset, split


def _found(splits: Splits, part: str | None) -> str:
    if part is None:
        return "found several parts and none named"
    is_split = any(of_subset.get(part) for of_subset in splits.values())
    return f"found the split {part!r} in several subsets" if is_split else f"found no part {part!r} with files"


def _parts(splits: Splits) -> list[str]:
    """Return the parts that can be named, such as `:train` and `:subset/train`."""
    return [
        f":{split}" if list(splits) == [DEFAULT] else f":{subset}/{split}"
        for subset, of_subset in splits.items()
        for split, files in of_subset.items()
        if files
    ]


def _check_one_kind(files: list[str]) -> None:
    """Raise ValueError for files of several kinds, which may be the same data twice."""
    kinds = {PurePosixPath(name).suffix: name for name in files}
    if len(kinds) > 1:
        raise ValueError(
            f"found {' and '.join(sorted(kinds.values()))}, which may be the same data twice; name one file, such as "
            f":{min(kinds.values())}"
        )


def _check_shards(files: list[str]) -> None:
    """Raise ValueError if of shards that number themselves some are missing, or some are of another set."""
    sets: dict[tuple[str, str], dict[int, set[int]]] = {}
    for name in files:
        if shard := _SHARD.fullmatch(name):
            of_stem = sets.setdefault((shard["stem"], PurePosixPath(name).suffix), {})
            of_stem.setdefault(int(shard["count"]), set()).add(int(shard["number"]))
    for (stem, _), counts in sets.items():
        count, numbers = next(iter(counts.items()))
        if len(counts) > 1:
            raise ValueError(
                f"found files of {stem} in sets of {' and of '.join(map(str, sorted(counts)))}, which may be the same "
                "data twice; name one file"
            )
        if missing := set(range(count)) - numbers:
            raise ValueError(
                f"found {len(numbers)} of the {count} files of {stem}, expected number {min(missing)} too; download it "
                "again"
            )
