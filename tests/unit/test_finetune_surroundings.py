"""`dora-fx finetune` among moved, removed and damaged files, odd terminals, and sizes that nothing holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dora_fx.app.cli.main import main
from dora_fx.app.errors import UserError
from dora_fx.app.runs.run_folder import RunFolder
from tests.finetune_runs import finetune, rows
from tests.hf_models import adapter_of, finetune_inputs, save_tiny_checkpoint, tiny_tokenizer
from tests.tables import every_case


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a text and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    assert (
        finetune(
            *finetune_inputs(folder, "--compile", "none", "--eval-every", 0), "--steps", 2, "--run", folder / "run"
        )
        == 0
    )
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` in another place, whose run names the base and the text of the first."""
    return shutil.copytree(whole, tmp_path / "copy")


def options_of(folder: Path, *options: object) -> list[str]:
    """The inputs of a new run in a folder that has a base and a text."""
    sizes = ["--sequence-length", 32, "--batch-size", 2, "--sample-tokens", 4, "--device", "cpu", "--compile", "none"]
    inputs = ["--base", folder / "base", "--data", folder / "text.txt", *sizes, "--run", folder / "new", *options]
    return list(map(str, inputs))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a `finetune` that must fail."""
    capsys.readouterr()
    assert finetune(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("dora-fx: error: ") and shown.count("\n") == 1
    return shown


def moved(folder: Path) -> Path:
    """A run whose base and text lie where its config.yaml says no more."""
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    config |= dict(base=str(folder / "gone"), data=str(folder / "gone.txt"))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "run"


def test_a_run_goes_on_with_its_base_and_text_in_another_place(
    whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moved(folder)
    message = error_of(capsys, "--resume", run, "--steps", 3)
    assert (
        "gone.txt: No such file or directory" in message
        and "if it was moved since the run was started, give its new path with --data" in message
    )
    message = error_of(capsys, "--resume", run, "--steps", 3, "--data", folder / "text.txt")
    assert (
        "gone: no such file or directory" in message
        and "since the run was started, give its new path with --base" in message
    )
    places = "--base", folder / "base", "--data", folder / "text.txt"
    assert finetune("--resume", run, "--steps", 3, *places) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["base"], config["data"]) == (str(folder / "base"), str(folder / "text.txt"))
    # From here on it knows its base itself, for every command.
    assert finetune("--resume", run, "--steps", 4) == 0
    assert main(["merge", str(run), "--to", str(folder / "merged")]) == 0
    other = shutil.copytree(whole / "run", folder / "other")
    assert finetune("--resume", other, "--steps", 4) == 0
    torch.testing.assert_close(adapter_of(run), adapter_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("command", ["export", "merge"])
def test_export_and_merge_take_the_base_in_another_place(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = moved(folder)
    arguments = [command, run, "--to", folder / "out"]
    assert main(list(map(str, arguments))) == 2
    shown = capsys.readouterr().err
    assert (
        "gone: no such file or directory" in shown
        and "since the run was started, give its new path with --base" in shown
    )
    assert main(list(map(str, [*arguments, "--base", folder / "base"]))) == 0
    if command == "export":
        config = json.loads((folder / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "base")


def test_another_base_and_another_text_are_not_taken_for_moved_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_checkpoint(folder / "seed", seed=4)
    message = error_of(capsys, "--resume", folder / "run", "--steps", 3, "--base", folder / "seed")
    assert "was trained on another base model than this one" in message
    (folder / "other.txt").write_text((folder / "text.txt").read_text()[:-1])
    message = error_of(capsys, "--resume", folder / "run", "--steps", 3, "--data", folder / "other.txt")
    assert "the text is not the one that the run was started with" in message
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["steps"] == 2


@pytest.mark.parametrize(
    "names", [["metrics.jsonl"], ["samples.jsonl"], ["metrics.jsonl", "samples.jsonl", "loss.png"]]
)
def test_a_run_without_its_records_goes_on(names: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names:
        (folder / "run" / name).unlink()
    assert finetune("--resume", folder / "run", "--steps", 3) == 0
    shown = capsys.readouterr().out
    assert ("before," in shown) == ("metrics.jsonl" not in names)
    assert ("\nbefore:  " in shown) == ("samples.jsonl" not in names)
    assert "\nafter:   " in shown and 3 in rows(folder / "run", "held_out_loss")


@every_case(
    ("name", "damage", "message"),
    [
        ("metrics.jsonl", lambda text: b"noise\n" + text, "metrics.jsonl, line 1: the line is damaged"),
        ("metrics.jsonl", lambda text: text.replace(b'"step": 2', b'"step": "2"'), "metrics.jsonl, line 3"),
        ("metrics.jsonl", lambda text: text.replace(b'"step": 1,', b""), "metrics.jsonl, line 2"),
        ("metrics.jsonl", lambda text: text + b'{"step": 3, "loss": null}\n', "metrics.jsonl, line 5"),
        ("metrics.jsonl", lambda text: text + b"[1]\n", "metrics.jsonl, line 5"),
        ("metrics.jsonl", lambda text: text + b"[" * 100_000 + b"\n", "metrics.jsonl, line 5"),
        ("metrics.jsonl", lambda text: bytes(len(text)) + b"\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", lambda text: text + b'{"step": 3, "\xff": 1}\n', "metrics.jsonl, line 5"),
        ("samples.jsonl", lambda text: b"\xff\xfe" + text, "samples.jsonl, line 1"),
        ("samples.jsonl", lambda text: text.replace(b'"prompt"', b'"prmpt"'), "samples.jsonl, line 1"),
        ("config.yaml", lambda text: b"[", "config.yaml"),
        ("config.yaml", lambda text: b"- 1\n", "config.yaml"),
        ("config.yaml", lambda text: b"\xff\xfe", "config.yaml"),
        ("config.yaml", lambda text: b"", "config.yaml"),
        ("config.yaml", lambda text: text.replace(b"steps: 2", b"steps: two"), "--steps"),
    ],
)
def test_damaged_records_are_named_with_their_line_before_anything_is_loaded(
    name: str, damage: Callable[[bytes], bytes], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "run" / name
    file.write_bytes(damage(file.read_bytes()))
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert finetune("--resume", folder / "run", "--steps", 3) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("half", ['{"step": 2, "pro', "\x00\x00"])
def test_half_a_row_that_a_killed_run_left_does_not_damage_the_next(half: str, folder: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / "run" / name).open("a") as file:
            file.write(half)
    for steps in (3, 4):
        assert finetune("--resume", folder / "run", "--steps", steps) == 0
    assert list(RunFolder(folder / "run").read_samples()) == [0, 2, 3, 4]
    assert list(rows(folder / "run")) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_folder_in_place_of_a_record_is_named(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run" / name).unlink()
    (folder / "run" / name).mkdir()
    shown = error_of(capsys, "--resume", folder / "run", "--steps", 3)
    assert f"{folder / 'run' / name}: found a directory, expected a regular file; remove it" in shown


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1:strict", marks=pytest.mark.slow)])
def test_a_sample_is_shown_on_a_terminal_that_lacks_its_letters(encoding: str, folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox\n" * 60, encoding="utf-8")
    command = [sys.executable, "-m", "dora_fx.app.cli.main", "finetune"]
    prompt = ["--steps", "1", "--prompt", "na\u00efve \u2192 \U0001f98a", "--run", str(folder / "\u00e9t\u00e9")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    environment |= dict(PYTHONIOENCODING=encoding, LC_ALL="C", OMP_NUM_THREADS="1")
    # Letters that this tokenizer does not know would come back as "?".
    add_letters(folder / "base", "na\u00efve \u2192 \U0001f98a")
    done = subprocess.run([*command, *options_of(folder, *prompt)], capture_output=True, env=environment)
    # Without a terminal there are no bars, and no library says anything.
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u2192" in done.stdout and rb"\U0001f98a" in done.stdout
    assert "\u2192" in RunFolder(folder / "\u00e9t\u00e9").read_samples()[1]["prompt"]


def add_letters(base: Path, letters: str) -> None:
    """Give a tiny tokenizer more letters, in place of capital ones."""
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for capital, letter in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", dict.fromkeys(letters), strict=False):
        if letter not in vocabulary:
            vocabulary[letter] = vocabulary.pop(capital)
    (base / "tokenizer.json").write_text(json.dumps(content))


def test_output_that_nobody_reads_or_that_does_not_fit_ends_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "dora_fx.app.cli.main", "inspect", str(folder / "run")]
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    for stream, code, message in ((write, 141, ""), (full, 2, "the output cannot be written: No space left on device")):
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True)
        os.close(stream)
        assert done.returncode == code and message in done.stderr
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@every_case(
    ("options", "message"),
    [
        (["--batch-size", 10**12], "--batch-size: found 1000000000000 sequences of 32 tokens, whose logits and"),
        (["--batch-size", 10**400], "sequences of 32 tokens, whose logits and attention weights alone take"),
        (["--batch-size", 1000], "--batch-size: found 1000, expected at most 60, the sequences to train on"),
        (["--sequence-length", 129], "--sequence-length: found 129, expected at most 128, the base model's"),
        (["--sample-tokens", 113], "--sample-tokens: found 113 after 16 of the prompt, expected at most 128 in all"),
        (["--prompt", "x" * 125], "--sample-tokens: found 4 after 125 of the prompt, expected at most 128 in all"),
        (["--dim", 2**50], "--dim: an adapter of 1125899906842624 does not fit in memory (RuntimeError: "),
    ],
    ids=str,
)
def test_sizes_that_nothing_holds_are_named(
    options: list[object], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *options_of(folder, *options))
    assert not (folder / "new").exists()


@pytest.mark.parametrize("template", ["<b> $A", "$A"])
def test_a_run_trains_on_the_tokenizers_own_start_tokens(template: str, folder: Path) -> None:
    tiny_tokenizer(template).save_pretrained(folder / "base")
    (folder / "text.jsonl").write_text('{"text": "the quick brown fox"}\n' * 60)
    options = ["--data", folder / "text.jsonl", "--prompt", "the", "--steps", 1]
    assert finetune(*options_of(folder, *options)) == 0
    prompt = RunFolder(folder / "new").read_samples()[1]["prompt"]
    assert ("<b>" in prompt) == template.startswith("<b>")


def test_a_tokenizer_with_more_tokens_than_the_model_is_said_or_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained(folder / "base")
    assert finetune(*options_of(folder, "--steps", 1)) == 0
    assert "tokens of the tokenizer that the model lacks: 2; the text has none of them" in capsys.readouterr().out
    shutil.rmtree(folder / "new")
    (folder / "text.txt").write_text((folder / "text.txt").read_text() + "<three>")
    message = error_of(capsys, *options_of(folder, "--steps", 1))
    assert "the text has the token '<three>' with id 65, expected an id below 64, the model's vocabulary" in message
    assert not (folder / "new").exists()


@every_case("name", ["metrics.jsonl", "samples.jsonl", "loss.png"])
def test_a_full_disk_is_one_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes nothing, as a full disk; a picture is written to a file of its own, so its folder is gone."""
    run = RunFolder(folder / "run")
    if name == "loss.png":
        shutil.rmtree(folder / "run")
    else:
        (folder / "run" / name).unlink()
        (folder / "run" / name).symlink_to("/dev/full")
    calls: dict[str, Callable[[], Any]] = {
        "metrics.jsonl": lambda: run.append_metrics({"step": 1}),
        "samples.jsonl": lambda: run.append_sample(1, "a", "b"),
        "loss.png": lambda: run.draw_loss_curve("a title"),
    }
    with pytest.raises(UserError, match=rf"{name}: No (space left on device|such file or directory)$"):
        calls[name]()


def test_a_run_folder_that_cannot_be_made_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").touch()
    for path, found in (
        (folder / "file" / "below", "Not a directory"),
        (folder / ("x" * 300), "File name too long"),
        ("/proc/new", "No such file or directory"),
    ):
        message = error_of(capsys, *options_of(folder, "--run", path))
        assert f"--run {path}: {found}" in message
