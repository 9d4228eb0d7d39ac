"""Names of repositories on the Hugging Face hub: `org/name`, `org/name@revision` and `org/name@revision:part`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(
    rf"(?P<repository>{_SEGMENT}/{_SEGMENT})(?:@(?P<revision>[A-Za-z0-9_][^\s:@]*))?(?::(?P<part>[^\s:][^:]*))?"
)
# A path with one of these suffixes that does not exist is a mistyped path, and not a repository.
_FILE = re.compile(r"\.(txt|jsonl?|csv|parquet|gguf|ya?ml|safetensors)$", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub.

    Attributes:
        repository: organisation or user, and name.
        revision: branch, tag or commit; None for the main branch.
        part: of a data set its split, subset and split, or file; of a model a GGUF file; None if none is named.
    """

    repository: str
    revision: str | None = None
    part: str | None = None

    @classmethod
    def parse_maybe(cls, text: str) -> HubName | None:
        """Return the name that a text is, None if it has another form."""
        found = _NAME.fullmatch(text)
        if found is None or _FILE.search(found["repository"]):
            return None
        return cls(found["repository"], found["revision"], found["part"])

    @property
    def is_pinned(self) -> bool:
        """Return whether the revision is a whole commit hash, which always has the same files."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> HubName:
        """Return the name with a commit for its revision."""
        return replace(self, revision=commit)

    @property
    def without_part(self) -> str:
        """The repository and its revision."""
        return str(replace(self, part=None))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        return f"{self.repository}{revision}" + (f":{self.part}" if self.part is not None else "")


def local_path_and_part(name: str) -> tuple[Path, str | None]:
    """Return the path that a name is and None; for `folder:part` with an existing folder, the folder and the part."""
    folder, colon, part = name.rpartition(":")
    is_part = bool(colon and part) and not os.path.lexists(name) and os.path.isdir(folder)
    return (Path(folder), part) if is_part else (Path(name), None)


def hub_name_maybe(name: str) -> HubName | None:
    """Return the name of a repository; None for an existing file or folder, which wins over one, and for other forms.

    A folder that has the name without its part wins as well.
    """
    path, _ = local_path_and_part(name)
    return None if os.path.lexists(path) else HubName.parse_maybe(name)


def absolute_or_on_hub(name: str) -> str:
    """Return a path as an absolute path, and a name on the hub as it is: both mean the same in every folder."""
    return name if hub_name_maybe(name) is not None else str(Path(name).absolute())


def shown_name(name: str) -> str:
    """Return the name of a base or of data for people: of a file or folder without its parents, without a revision."""
    on_hub = HubName.parse_maybe(name)
    return Path(name).name if on_hub is None else on_hub.repository
