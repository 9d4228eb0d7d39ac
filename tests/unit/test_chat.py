"""`dora-fx chat`: answers are those of the merged model, as text and as turns; one line for what it cannot load."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import decoders

from dora_fx.app.cli.main import main
from tests.finetune_runs import finetune
from tests.hf_models import finetune_inputs, tiny_tokenizer
from tests.tables import every_case

TEMPLATE = "{% for message in messages %}{{ message['content'] }}.{% endfor %}"
GREEDY = ["--temperature", "0", "--max-new-tokens", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has learned its text, the merged model, and the PEFT adapter."""
    folder = tmp_path_factory.mktemp("chat")
    options = ["--compile", "none", "--lr", 0.02, "--steps", 30, "--sample-tokens", 0]
    inputs = finetune_inputs(folder, *options)
    give_template(folder / "base", None)
    assert finetune(*inputs, "--run", folder / "run") == 0
    for command, target in (("merge", "merged"), ("export", "adapter")):
        assert main([command, str(folder / "run"), "--to", str(folder / target)]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, whose run names the base of the first."""
    return shutil.copytree(trained, tmp_path / "copy")


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints to stdout, which must be the answer alone."""
    capsys.readouterr()
    assert main(["chat", *map(str, arguments), *GREEDY]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must fail before it answers; phases may come before it."""
    capsys.readouterr()
    assert main(["chat", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err and shown.err.count("error: ") == 1
    return shown.err.strip().splitlines()[-1]


def expected_answer(model: Path, prompt: str) -> str:
    """What a loop of argmax over whole forward passes gives, up to an end of the tokenizer's or of the config's."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = tokens.shape[1]
    with torch.no_grad():
        for _ in range(12):
            following = network(tokens).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
            if following.item() in (tokenizer.eos_token_id, network.config.eos_token_id):
                break
    return str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))


def test_a_run_and_its_merged_model_give_the_answer_of_transformers(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "the quick brown fox jum"
    expected = expected_answer(trained / "merged", prompt)
    assert expected != expected_answer(trained / "base", prompt)
    for model in ("run", "merged"):
        assert answer_of(capsys, trained / model, "--prompt", prompt) == f"{expected}\n"
    checkpoint = [trained / "run" / "checkpoint", "--base", trained / "base"]
    assert answer_of(capsys, *checkpoint, "--prompt", prompt) == f"{expected}\n"
    assert answer_of(capsys, trained / "base", "--prompt", prompt) == f"{expected_answer(trained / 'base', prompt)}\n"


def give_template(model: Path, template: str | None) -> None:
    """Save a tokenizer with a chat template, whose text of several tokens is that of each, one after the other."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)


def test_lines_are_turns_of_the_chat_template_and_raw_is_without_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_template(folder / "merged", TEMPLATE)
    model = folder / "merged"
    first = expected_answer(model, "the quick.")
    second = expected_answer(model, f"the quick.{first}.brown.")
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick\n\nbrown\n/new\nbrown\n/exit\nnever\n"))
    assert answer_of(capsys, model) == f"{first}\n{second}\n{expected_answer(model, 'brown.')}\n"
    system = expected_answer(model, "be kind.the quick.")
    assert answer_of(capsys, model, "--system", "be kind", "--prompt", "the quick") == f"{system}\n"
    raw = expected_answer(model, "the quick")
    assert answer_of(capsys, model, "--raw", "--prompt", "the quick") == f"{raw}\n"


def test_a_seed_gives_the_same_sample_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*options: object) -> str:
        capsys.readouterr()
        arguments = ["--prompt", "the", "--max-new-tokens", 40, "--temperature", 3, "--device", "cpu", *options]
        assert main(["chat", str(trained / "run"), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    # Of the least share only the likeliest token is left, at any temperature.
    prompt = ["--prompt", "the", "--max-new-tokens", 12]
    assert sample(*prompt, "--top-p", 1e-9) == answer_of(capsys, trained / "run", "--prompt", "the")


def test_every_end_that_the_folder_names_ends_an_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompt = folder / "merged", "the quick brown fox jum"
    whole = expected_answer(model, prompt)
    second = tiny_tokenizer().convert_tokens_to_ids(whole[1])
    assert whole[1] not in (whole[0], "?")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, second]}))
    assert answer_of(capsys, model, "--prompt", prompt) == f"{whole[:2]}\n"


def without(*names: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@every_case(
    ("model", "damage", "message"),
    [
        ("nowhere", lambda folder: None, "nowhere: no such file or directory"),
        ("text.txt", lambda folder: None, "text.txt: found a .txt file, expected .gguf or a directory"),
        (".", lambda folder: None, "found neither the config.yaml of a run nor the config.json of a model"),
        ("adapter", lambda folder: None, "found an adapter for Hugging Face PEFT, expected a run"),
        ("run", without("run/checkpoint"), "is not finished; wait for its end"),
        ("run", without("run/checkpoint/common.pt"), "common.pt"),
        ("run", overwrite("run/checkpoint/dora_fx.json", b"{"), "dora_fx.json"),
        ("run", overwrite("run/config.yaml", b"["), "config.yaml: cannot be read"),
        ("run", overwrite("run/config.yaml", b"steps: 2\n"), "found no base in it; give --base"),
        ("run/checkpoint", lambda folder: None, "found no config.yaml of a run, which names the base; give --base"),
        ("merged", without("merged/tokenizer.json", "merged/tokenizer_config.json"), "tokenizer"),
        ("merged", without("merged/model.safetensors"), "expected one of model.safetensors"),
        ("merged", overwrite("merged/model.safetensors", b"x" * 99), "model.safetensors"),
        ("merged", overwrite("merged/config.json", b"{"), "config.json"),
        ("merged", overwrite("merged/generation_config.json", b"{"), "generation_config.json"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    model: str, damage: Callable[[Path], Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    found = error_of(capsys, folder / model, "--prompt", "the")
    assert message in found


@every_case(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--temperature: found -1.0, expected zero or a positive number"),
        (["--top-p", "0"], "--top-p: found 0.0, expected a number above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0, expected a positive integer"),
        (["--max-new-tokens", "126"], "--max-new-tokens: found 126 after 3 tokens of the prompt, expected at most 128"),
        (["--seed", "-1"], "--seed: found -1, expected an integer"),
        (["--prompt", " "], "--prompt: found ' ', expected some text"),
        (["--prompt", "\udcff"], "--prompt: found bytes that are not UTF-8"),
        (["--system", "x"], "--system: found a tokenizer without a chat template"),
        (["--raw", "--system", "x"], "--system: found --raw beside it"),
        (["--base", "x"], "a model by itself, expected a run or a checkpoint"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_taken_is_named(
    options: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, trained / "merged", "--prompt", "the", "--device", "cpu", *options)


@every_case("template", ["{{ raise_exception('roles must alternate') }}", "{% for", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_one_line(template: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    give_template(folder / "merged", template)
    assert "the chat template refuses this; --raw" in error_of(capsys, folder / "merged", "--prompt", "the")


def test_another_base_than_the_run_s_own_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, folder / "run", "--base", folder / "merged", "--prompt", "the")
    assert "was trained on another base model than this one" in message
