"""Bases and data of the hub on several ranks: one of each node downloads, all have one commit, and fail together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.distributed.finetune_ranks import finetune
from tests.hf_models import save_tiny_checkpoint
from tests.hub_server import Hub, files_in, hub_server, point_rank_at

LINES = b"".join(b'{"text": "the quick brown fox jumps over the lazy dog, %d times."}\n' % count for count in range(40))
OPTIONS = ["--base", "org/tiny", "--data", "org/lines", "--device", "cpu", "--sequence-length", 32, "--compile", "none"]
OPTIONS += ["--sample-tokens", 0, "--steps", 1, "--dp", 2, "--gradient-accumulation", 2]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as server:
        server.add("models", "org/tiny", files_in(save_tiny_checkpoint(tmp_path / "local")))
        server.add("datasets", "org/lines", {"train.jsonl": LINES})
        yield server


def test_one_rank_of_a_node_downloads(hub: Hub, tmp_path: Path) -> None:
    prepare = partial(point_rank_at, hub.endpoint, tmp_path / "cache", None)
    text = finetune(2, *OPTIONS, "--run", tmp_path / "run", prepare=prepare)
    assert text.count("downloading org/tiny from the Hugging Face hub (") == 1
    assert sorted(hub.resolved) == ["org/lines", "org/tiny"]
    large = [name for name in hub.fetched if name != ".gitattributes"]
    assert len(large) == len(set(large)) and {"model.safetensors", "train.jsonl"} < set(large)


def test_a_rank_of_each_node_downloads_the_commit_of_the_first(hub: Hub, tmp_path: Path) -> None:
    prepare = partial(point_rank_at, hub.endpoint, tmp_path / "cache", tmp_path / "cache-2")
    finetune(2, *OPTIONS, "--run", tmp_path / "run", prepare=prepare)
    assert sorted(hub.resolved) == ["org/lines", "org/tiny"]
    assert hub.fetched.count("model.safetensors") == hub.fetched.count("train.jsonl") == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["base"] == f"org/tiny@{hub.repositories['models/org/tiny'].branches['main']}"


def test_what_fails_on_one_rank_fails_on_all(hub: Hub, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", ["--run", tmp_path / "run"]
    (tmp_path / "file").write_text("")
    prepare = partial(point_rank_at, hub.endpoint, cache, None)
    local = ["--base", str(tmp_path / "local")]
    text = finetune(2, *OPTIONS, *run, prepare=prepare, of_rank_1=local, expect=2)
    assert text.count(f"--base: found {tmp_path}/local, but org/tiny on rank 0; expected the same on every rank") == 2
    text = finetune(2, *OPTIONS, *local, *run, prepare=prepare, of_rank_1=["--base", "org/tiny"], expect=2)
    assert text.count(f"--base: found org/tiny, but {tmp_path}/local on rank 0") == 2
    no_cache = partial(point_rank_at, hub.endpoint, cache, tmp_path / "file" / "cache")
    text = finetune(2, *OPTIONS, *run, prepare=no_cache, expect=2)
    assert text.count(f"the cache in {tmp_path}/file/cache cannot be written (Not a directory)") == 2
    hub.repositories["models/org/tiny"].is_gated = True
    text = finetune(2, *OPTIONS, *run, prepare=partial(point_rank_at, hub.endpoint, tmp_path / "new", None), expect=2)
    assert text.count("the repository is gated") == 2
    assert not (tmp_path / "run").exists()
