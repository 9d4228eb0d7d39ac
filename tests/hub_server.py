"""A stand-in for the Hugging Face hub on this machine: the routes and headers that huggingface_hub relies on."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_HOST = "127.0.0.1"
_LONGEST_STALL = 30
# Files that the hub keeps beside git, and answers with a redirect to another address.
_LARGE = (".safetensors", ".bin", ".parquet", ".gguf")


@dataclass
class Repository:
    """A repository: the files of each commit, and the commits of branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files alone; return its hash."""
        text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()}, sort_keys=True)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = dict(files), commit
        return commit


@dataclass
class Hub:
    """The server: its repositories by `models/org/name` and `datasets/org/name`, and what it was asked for.

    `resolved` has the names of branches that were looked up, and `fetched` the files that were sent, in part or whole.
    `cut_after` breaks off the next answer that is longer. Files are held back while `go_on` is not set.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    resolved: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    requests: int = 0
    cut_after: int | None = None
    go_on: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""

    def add(self, kind: str, name: str, files: Mapping[str, bytes]) -> Repository:
        """Add a repository of `models` or `datasets` with one commit."""
        repository = self.repositories[f"{kind}/{name}"] = Repository()
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return repository


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub while the block runs."""
    hub = Hub()
    hub.go_on.set()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer((_HOST, 0), handler)
    hub.endpoint = f"http://{_HOST}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder as those of a repository."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def point_at(endpoint: str, cache: Path) -> None:
    """Let huggingface_hub of this process ask a server and keep a cache: it reads both when it is imported."""
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(cache)


def point_rank_at(endpoint: str, cache: Path, of_rank_1: Path | None, rank: int) -> None:
    """Point a rank at a server: all ranks of one node with one cache, or rank 1 of another node with its own."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    point_at(endpoint, cache if of_rank_1 is None or rank == 0 else of_rank_1)
    if of_rank_1 is not None:
        os.environ["LOCAL_RANK"] = "0"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/"):
            self._api(*path.split("/")[1:])
        elif path.startswith("cdn/"):
            self._send_file(*path.split("/", 5)[1:])
        else:
            parts = path.split("/")
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            org, name, _, revision = parts[:4]
            self._resolve(kind, org, name, revision, "/".join(parts[4:]))

    def _api(self, kind: str, org: str, name: str, what: str = "revision", *rest: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{org}/{name}")
        if repository is None:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        commit = self._commit(repository, "/".join(rest) or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        files = repository.commits[commit]
        if what == "tree":
            return self._send_json([_entry(path, data) for path, data in files.items()])
        self.hub.resolved.append(f"{org}/{name}")
        siblings = [{"rfilename": path} for path in files]
        return self._send_json({"_id": "0", "id": f"{org}/{name}", "sha": commit, "siblings": siblings, "tags": []})

    def _resolve(self, kind: str, org: str, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{org}/{name}")
        if repository is None:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if repository.is_gated:
            return self._refuse(403, "GatedRepo", f"Access to model {org}/{name} is restricted")
        commit = self._commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if path not in repository.commits[commit]:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if path.endswith(_LARGE):
            data = repository.commits[commit][path]
            return self._answer(
                302,
                b"",
                {
                    "Location": f"{self.hub.endpoint}/cdn/{kind}/{org}/{name}/{commit}/{path}",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Linked-Size": str(len(data)),
                },
            )
        return self._send_file(kind, org, name, commit, path)

    def _send_file(self, kind: str, org: str, name: str, commit: str, path: str) -> None:
        data = self.hub.repositories[f"{kind}/{org}/{name}"].commits[commit][path]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.fetched.append(path)
            self.hub.go_on.wait(_LONGEST_STALL)
        self._answer(206 if start else 200, data[start:], headers)

    def _commit(self, repository: Repository, revision: str) -> str | None:
        return revision if revision in repository.commits else repository.branches.get(revision)

    def _send_json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, more: Mapping[str, str] | None = None) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(more or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, self.hub.cut_after = self.hub.cut_after, None
        if cut is not None and len(body) > cut:
            self.wfile.write(body[:cut])
            self.close_connection = True
            return
        self.hub.cut_after = cut
        self.wfile.write(body)


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
