"""Bases and data of the Hugging Face hub, from a server on this machine that answers as the hub does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from dora_fx.app.bases import load_checkpoint, resolve_base
from dora_fx.app.cli.main import main
from dora_fx.app.errors import Interrupted, UserError
from dora_fx.app.hub import HubRepository
from dora_fx.app.options import HubName
from dora_fx.app.runs import Display
from tests.finetune_runs import finetune, rows, step_of
from tests.hf_models import adapter_of, finetune_inputs, save_tiny_checkpoint, tiny_hf_model
from tests.hub_server import Hub, files_in, hub_server, point_at

LINES = b"".join(
    b'{"text": "the quick brown fox jumps over the lazy dog, %d times."}\n' % number for number in range(40)
)
OTHER_LINES = LINES.replace(b"fox", b"cat")
# What a base of the hub often has beside what is needed.
OTHER_FORMATS = {
    "pytorch_model.bin": b"x" * 100,
    "consolidated.safetensors": b"x" * 100,
    "onnx/model.onnx": b"x" * 100,
    "original/consolidated.00.pth": b"x" * 100,
    "model.gguf": b"x" * 100,
    "README.md": b"# A model",
}
NEEDED = {"LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
OPTIONS = ["--device", "cpu", "--sequence-length", 32, "--batch-size", 2, "--sample-tokens", 4, "--compile", "none"]


@pytest.fixture(scope="module")
def base_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_in(save_tiny_checkpoint(tmp_path_factory.mktemp("base"))) | {"LICENSE": b"free"}


@pytest.fixture
def hub(base_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setattr(constants, name, getattr(constants, name))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with hub_server() as server:
        point_at(server.endpoint, tmp_path / "cache")
        server.add("models", "org/tiny", base_files | OTHER_FORMATS)
        server.add("datasets", "org/lines", {"train.jsonl": LINES, "test.jsonl": OTHER_LINES, "README.md": b"# Lines"})
        yield server


def commit_of(hub: Hub, name: str) -> str:
    return hub.repositories[name].branches["main"]


def test_a_run_on_the_hub_is_resumed_with_the_same_files_and_no_network(
    hub: Hub, base_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert finetune("--base", "org/tiny", "--data", "org/lines", *OPTIONS, "--steps", 2, "--run", run) == 0
    shown = capsys.readouterr().out
    assert re.search(r"files of org/lines@[0-9a-f]{40}: train.jsonl\n", shown)
    assert "downloading org/tiny from the Hugging Face hub (" in shown and "loading org/tiny: " in shown
    assert set(hub.fetched) == {*NEEDED, "model.safetensors", "train.jsonl", "README.md", ".gitattributes"}
    assert len(hub.fetched) == len(set(hub.fetched)) + 1  # .gitattributes of each
    base, data = (commit_of(hub, name) for name in ("models/org/tiny", "datasets/org/lines"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["base"], saved["data"]) == (f"org/tiny@{base}", f"org/lines@{data}")

    # Both move on, and the resumed run asks for nothing.
    hub.repositories["models/org/tiny"].commit({**base_files, "LICENSE": b"other"})
    hub.repositories["datasets/org/lines"].commit({"train.jsonl": OTHER_LINES})
    asked = hub.requests
    assert finetune("--resume", run, "--steps", 4) == 0
    assert hub.requests == asked and step_of(run) == 4

    # The same from local files.
    inputs = finetune_inputs(tmp_path / "local")
    (tmp_path / "local" / "lines.jsonl").write_bytes(LINES)
    assert finetune(*inputs, "--data", tmp_path / "local" / "lines.jsonl", *OPTIONS, "--steps", 4, "--run", plain) == 0
    assert rows(run) == rows(plain)
    torch.testing.assert_close(adapter_of(run), adapter_of(plain), rtol=0, atol=0)

    # Another state is refused by its name, before its weights are fetched.
    capsys.readouterr()
    for option, name, started in (("--base", "org/tiny", base), ("--data", "org/lines", data)):
        now = commit_of(hub, ("models/" if option == "--base" else "datasets/") + name)
        assert finetune("--resume", run, "--steps", 6, option, f"{name}@main") == 2
        message = capsys.readouterr().err
        assert f"{option}: found {name}@{now}, but the run to resume was started with {name}@{started}" in message
    assert hub.fetched.count("model.safetensors") == 1
    assert finetune("--resume", run, "--steps", 6, "--data", f"org/lines@{data}:test") == 2
    assert f"--data: found org/lines@{data}:test, but" in capsys.readouterr().err


def test_other_commands_take_a_base_of_the_hub(
    hub: Hub, base_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, commit = tmp_path / "run", commit_of(hub, "models/org/tiny")
    inputs = finetune_inputs(tmp_path / "local", "--compile", "none", "--steps", 1, "--run", run)
    assert finetune(*inputs) == 0
    assert main(["export", str(run), "--to", "adapter", "--base", "org/tiny"]) == 0
    # The config is enough.
    assert "model.safetensors" not in hub.fetched and set(hub.fetched) > NEEDED
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit)
    assert main(["merge", str(run), "--to", "merged", "--base", f"org/tiny@{commit}"]) == 0
    assert hub.fetched.count("model.safetensors") == 1
    assert Path("merged/LICENSE").read_bytes() == b"free"
    arguments = ["--prompt", "the", "--max-new-tokens", "2", "--device", "cpu"]
    capsys.readouterr()
    for model in (["org/tiny@main"], [str(run), "--base", "org/tiny"]):
        assert main(["chat", *model, *arguments]) == 0
    asked = len(hub.fetched)
    assert main(["chat", str(run), "--base", "org/tiny@gone", *arguments]) == 2
    assert "--base org/tiny@gone: found no revision gone of org/tiny, expected a branch" in capsys.readouterr().err
    # An adapter that was trained on other weights.
    other = save_tiny_checkpoint(tmp_path / "other", seed=4)
    hub.add("models", "org/other", files_in(other))
    assert main(["merge", str(run), "--to", "merged-2", "--base", "org/other"]) == 2
    assert "--base org/other" in capsys.readouterr().err and len(hub.fetched) > asked


def test_a_sample_is_shown_without_weights(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = b"".join(b'{"prompt": "what is it?", "completion": "a fox"}\n' for _ in range(4))
    hub.add("datasets", "org/pairs", {"data/train-00000-of-00001.jsonl": pairs})
    assert finetune("--base", "org/tiny", "--data", "org/pairs:train", "--show-sample", "--sequence-length", 32) == 0
    assert "learned" in capsys.readouterr().out
    assert "model.safetensors" not in hub.fetched and "tokenizer.json" in hub.fetched


def test_a_local_folder_of_the_name_wins(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also as `hf download --local-dir` wrote it on another machine: the same command finds it."""
    save_tiny_checkpoint(tmp_path / "org" / "tiny")
    lines = tmp_path / "org" / "lines" / "data"
    lines.mkdir(parents=True)
    (lines / "train-00000-of-00001.jsonl").write_bytes(LINES)
    (lines / "test-00000-of-00001.jsonl").write_bytes(OTHER_LINES)
    names = "--base", "org/tiny", "--data", "org/lines:train"
    assert finetune(*names, *OPTIONS, "--steps", 1, "--run", "run") == 0
    assert hub.requests == 0
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (saved["base"], saved["data"]) == (str(tmp_path / "org/tiny"), str(tmp_path / "org/lines:train"))
    assert finetune("--resume", "run", "--steps", 2) == 0
    capsys.readouterr()
    assert finetune("--base", "org/tiny", "--data", "org/lines:dev", *OPTIONS, "--run", "run-2") == 2
    assert "org/lines:dev: found no part 'dev' with files, expected one of :test, :train" in capsys.readouterr().err


def test_a_download_that_breaks_off_goes_on(hub: Hub, base_files: dict[str, bytes], monkeypatch) -> None:
    # Bytes of a chunk that is not whole are asked for again, and a chunk has ten million.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    repository = HubRepository("--base", "model", HubName("org/tiny")).pinned()
    repository.files()
    hub.cut_after = 1200
    folder = repository.fetch(["model.safetensors"], Display(quiet=True))
    assert hub.ranges == ["bytes=1000-"]
    assert (folder / "model.safetensors").read_bytes() == base_files["model.safetensors"]


def test_an_interrupted_download_continues_with_what_is_missing(hub: Hub) -> None:
    repository = HubRepository("--base", "model", HubName("org/tiny")).pinned()
    names = ["tokenizer.json", "model.safetensors"]
    there = hub.repositories["models/org/tiny"].commits[str(repository.name.revision)]
    repository.files()
    data = there.pop("model.safetensors")
    with pytest.raises(UserError, match=r"--base org/tiny@[0-9a-f]{40}: "):
        repository.fetch(names, Display(quiet=True))
    there["model.safetensors"] = data
    folder = repository.fetch(names, Display(quiet=True))
    assert hub.fetched.count("tokenizer.json") == hub.fetched.count("model.safetensors") == 1
    assert (folder / "model.safetensors").read_bytes() == data


def test_a_signal_ends_a_download_at_once(hub: Hub, tmp_path: Path) -> None:
    """And not when the server has sent what it is asked for."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    repository = HubRepository("--base", "model", HubName("org/tiny")).pinned()
    repository.files()
    hub.go_on.clear()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(Interrupted):
            repository.fetch(["model.safetensors"], Display(quiet=True))
        assert not hub.go_on.is_set()
    finally:
        signal.signal(signal.SIGALRM, before)
        hub.go_on.set()
    assert not list(tmp_path.rglob("*.incomplete"))
    assert (repository.fetch(["model.safetensors"], Display(quiet=True)) / "model.safetensors").is_file()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert finetune(*arguments, *OPTIONS, "--run", "refused") == 2
    assert not Path("refused").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_what_the_hub_has_not_is_named(
    hub: Hub, base_files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--data", "org/lines:train"
    hub.add("models", "org/gated", base_files).is_gated = True
    hub.add("datasets", "org/gated", {"train.jsonl": LINES}).is_gated = True
    hub.add("models", "org/gguf", {"a.Q4.gguf": b"GGUF"})
    hub.add("models", "org/adapter", {"adapter_config.json": b"{}"})
    hub.add("models", "org/nothing", {"config.json": base_files["config.json"]})
    hub.add("datasets", "org/scripts", {"lines.py": b"", "README.md": b""})
    base = "--base", "org/tiny"
    address = re.escape(hub.endpoint)
    for arguments, message in (
        (("--base", "org/none", *data), rf"--base org/none: found no file or folder .* no model .* on {address}"),
        ((*base, "--data", "org/none:a"), rf"--data org/none:a: found no file or folder .* no data set .* {address}"),
        (("--base", "org/gated", *data), rf"--base org/gated\S*: the repository is gated.*{address}/org/gated, then"),
        (
            (*base, "--data", "org/gated"),
            rf"--data org/gated\S*: the repository is gated.*{address}/datasets/org/gated",
        ),
        (("--base", "org/tiny@v9", *data), r"--base org/tiny@v9: found no revision v9 of org/tiny, expected a branch"),
        ((*base, "--data", "org/lines@v9"), r"--data org/lines@v9: found no revision v9"),
        ((*base, "--data", "org/lines:dev"), r"--data org/lines@\w+:dev: found no part 'dev' .* one of :test, :train"),
        ((*base, "--data", "org/scripts"), r"found no data file, .* there are .*lines.py; scripts .* are not run"),
        (("--base", "org/gguf", *data), r"no config.json, expected .* its GGUF files as org/gguf@\w+:FILE: a.Q4.gguf"),
        (("--base", "org/adapter", *data), r"no config.json, but adapter_config.json, a PEFT adapter's"),
        (("--base", "org/nothing", *data), r"--base org/nothing\S*: found no model.safetensors"),
        (("--base", "org/tiny:b.gguf", *data), r"found no GGUF file b.gguf in the repository"),
        (("--base", "gpt2", *data), r"gpt2: no such file or directory; expected one, or .* as org/name or"),
        ((*base, "--data", "alpaca"), r"alpaca: no such file or directory; expected one, or .* as org/name, org/name:"),
        ((*base, "--data", "lines/train.jsonl"), r"lines/train.jsonl: No such file or directory"),
        (("--base", "org/tiny", "--data", "./org/lines"), r"org/lines: no such file or directory; expected one, or"),
    ):
        found = refused(capsys, *arguments)
        assert re.search(message, found), (message, found)
    assert "model.safetensors" not in hub.fetched


def test_without_a_network_one_line_says_what_to_run_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "--base", "org/tiny", "--data", "org/lines:train"
    dead = "http://127.0.0.1:9"
    point_at(dead, tmp_path / "cache")
    message = refused(capsys, *names)
    assert "--base org/tiny: found no file or folder of that name here, and not all of its files in the" in message
    assert f"the hub cannot be reached ({dead}: ConnectError: " in message
    assert (
        f"run: hf download org/tiny --local-dir org/tiny; then copy that folder to {tmp_path}/org/tiny and" in message
    )
    local = finetune_inputs(tmp_path / "local")[:2]
    message = refused(capsys, *local, "--data", "org/lines@v1:train")
    command = "hf download org/lines --repo-type dataset --revision v1 --local-dir org/lines@v1"
    assert f"run: {command}; then copy that folder to {tmp_path}/org/lines@v1 and start again" in message

    # What was cached is enough, offline too; what was not is named.
    point_at(hub.endpoint, tmp_path / "cache")
    assert finetune(*names, "--show-sample", "--sequence-length", 32) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = hub.requests
    assert finetune(*names, "--show-sample", "--sequence-length", 32) == 0
    capsys.readouterr()
    message = refused(capsys, *names)
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in message and hub.requests == asked


def test_single_files_in_the_cache_are_found_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `hf download org/name FILE` leaves them, without the list of all files; a shard that is missing is noticed."""
    from huggingface_hub import hf_hub_download, snapshot_download

    hub.add("datasets", "org/plain", {"train.jsonl": LINES, "train.parquet.md5": b""})
    snapshot_download("org/plain", repo_type="dataset", allow_patterns=["*.jsonl"])
    shards = {f"data/train-0000{number}-of-00002.jsonl": LINES for number in range(2)}
    hub.add("datasets", "org/shards", shards)
    for repository, kind, file in (
        *(("org/tiny", "model", name) for name in (*NEEDED, "model.safetensors")),
        ("org/shards", "dataset", "data/train-00000-of-00002.jsonl"),
    ):
        hf_hub_download(repository, file, repo_type=kind)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert finetune("--base", "org/tiny", "--data", "org/plain", "--show-sample", "--sequence-length", 32) == 0
    message = refused(capsys, "--base", "org/tiny", "--data", "org/shards")
    assert "found 1 of the 2 files of data/train, expected number 1 too" in message
    data = "org/shards:data/train-00000-of-00002.jsonl"
    assert finetune("--base", "org/tiny", "--data", data, *OPTIONS, "--steps", 1, "--run", "run") == 0


def test_a_gguf_file_and_shards_with_an_index(hub: Hub, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    tiny_hf_model().save_pretrained(folder, max_shard_size="40KB")
    files = files_in(folder)
    shards = {name for name in files if "-of-" in name}
    assert len(shards) > 1
    hub.add("models", "org/sharded", files | OTHER_FORMATS)
    path = resolve_base("org/sharded", Display(quiet=True))
    assert shards | {"model.safetensors.index.json"} < set(hub.fetched) and not set(OTHER_FORMATS) & set(hub.fetched)
    assert hub.fetched[-1] == "model.safetensors.index.json"
    loaded = load_checkpoint(path, torch.float32).state_dict
    torch.testing.assert_close(loaded, tiny_hf_model().state_dict(), rtol=0, atol=0)
    assert resolve_base("org/tiny:model.gguf", Display(quiet=True)).read_bytes() == OTHER_FORMATS["model.gguf"]


@pytest.mark.slow
def test_the_environment_says_where_the_hub_and_its_cache_are(hub: Hub, tmp_path: Path) -> None:
    """In a new interpreter, where huggingface_hub reads the environment."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    command = [
        sys.executable,
        "-m",
        "dora_fx.app.cli.main",
        "finetune",
        "--base",
        "org/tiny",
        "--data",
        "org/lines:test",
    ]
    command += [*map(str, OPTIONS), "--steps", "1", "--run", "run"]
    source = str(Path(__file__).parents[2])
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        environment = os.environ | settings | {"PYTHONPATH": source} | more
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        command[-1] = "run-2"
    assert (tmp_path / "home" / "hub" / "models--org--tiny").is_dir()
    assert rows(tmp_path / "run") == rows(tmp_path / "run-2")
