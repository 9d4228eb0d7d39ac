"""Resolves a name on the Hugging Face hub to a commit and to files in the local cache.

huggingface_hub keeps the cache: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they always mean. A
commit whose files are in the cache needs no network. Files are fetched one after the other in this thread: a signal
then ends the download at once, where a pool of threads would go on to the end of its files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dora_fx.app.hub.hub_errors import Kind, explaining
from dora_fx.app.options import HubName, hub_name_maybe
from dora_fx.app.runs import Display

_POLL_SECONDS = 0.2
# Every repository has one of them, and they are small.
_FIRST_FILES = {"model": ["config.json", ".gitattributes"], "dataset": ["README.md", ".gitattributes"]}


@dataclass(frozen=True)
class HubRepository:
    """A repository of models or data sets.

    Attributes:
        option: what named it, for messages.
        kind: what the repository holds.
        name: its name, with the revision that is meant.
    """

    option: str
    kind: Kind
    name: HubName

    def pinned(self) -> HubRepository:
        """Return the repository at the commit of its revision; without a network, at the last one that was cached.

        Raises:
            UserError: there is no such repository or revision, it is gated, or nothing is cached.
        """
        if self.name.is_pinned:
            return self
        from huggingface_hub import HfApi

        with self._explaining():
            found = HfApi().resolve_revision(self.name.repository, repo_type=self.kind, revision=self.name.revision)
            return replace(self, name=self.name.at(found.resolved))

    def files(self) -> dict[str, int]:
        """Return the names and sizes of the files at the commit.

        Where the list was never cached and there is no network, these are the files that are in the cache.

        Raises:
            UserError: as from `pinned`.
        """
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        with self._explaining():
            if (listed := self._listed_maybe()) is not None:
                return listed
            # Fetches the list as well, and keeps it.
            disable_progress_bars()
            first, commit = _FIRST_FILES[self.kind], self.name.revision
            found = snapshot_download(
                self.name.repository,
                repo_type=self.kind,
                revision=commit,
                allow_patterns=first,
                # huggingface_hub 1.31 raises offline, where later versions look into the cache.
                local_files_only=constants.HF_HUB_OFFLINE,
            )
            if (listed := self._listed_maybe()) is not None:
                return listed
            there = (path for path in Path(found).rglob("*") if path.is_file())
            return {path.relative_to(found).as_posix(): path.stat().st_size for path in there}

    def fetch(self, names: Sequence[str], display: Display) -> Path:
        """Download files unless they are in the cache; return the folder of the commit.

        What an interrupted download has completed stays in the cache.

        Args:
            names: of the files, from `files`.
            display: shows the progress.

        Raises:
            UserError: a file cannot be downloaded or written.
        """
        from huggingface_hub import hf_hub_download

        missing = [name for name in names if self._cached_maybe(name) is None]
        if missing:
            sizes, title = self.files(), f"downloading {self.name.repository} from the Hugging Face hub"
            size = sum(sizes.get(name, 0) for name in missing)
            with display.download(title, size) as show, self._explaining(), self._watched(show):
                for name in missing:
                    hf_hub_download(self.name.repository, name, repo_type=self.kind, revision=self.name.revision)
        first = self._cached_maybe(names[0])
        assert first is not None
        return first.parents[names[0].count("/")]

    def _listed_maybe(self) -> dict[str, int] | None:
        """Return the names and sizes of the files, None if the cache has no list of them."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self.name.repository, repo_type=self.kind, revision=self.name.revision)
        except CachedRepoTreeNotFoundError:
            return None
        return {file.path: file.size for file in tree}

    def _cached_maybe(self, name: str) -> Path | None:
        """Return the path of a file in the cache, None if it is not there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name.repository, name, repo_type=self.kind, revision=self.name.revision)
        return Path(found) if isinstance(found, str) else None

    @contextmanager
    def _watched(self, show: Callable[[int], None]) -> Iterator[None]:
        """While the block runs, show by how many bytes the repository's folder of the cache has grown."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=self.name.repository, repo_type=self.kind)
        blobs = Path(constants.HF_HUB_CACHE, folder, "blobs")
        before, is_over = _bytes_in(blobs), threading.Event()

        def watch() -> None:
            while not is_over.wait(_POLL_SECONDS):
                show(max(0, _bytes_in(blobs) - before))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join()
            show(max(0, _bytes_in(blobs) - before))

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        with explaining(self.option, self.kind, self.name):
            yield


def pinned_name(option: str, kind: Kind, name: str) -> str | None:
    """Return a name with the commit of its revision, None if it is not a name on the hub.

    Raises:
        UserError: as from `HubRepository.pinned`.
    """
    on_hub = hub_name_maybe(name)
    return None if on_hub is None else str(HubRepository(option, kind, on_hub).pinned().name)


def _bytes_in(folder: Path) -> int:
    """Add up the sizes of the files in a folder, of which some may disappear meanwhile."""
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            with suppress(OSError):
                total += file.stat().st_size
    return total
