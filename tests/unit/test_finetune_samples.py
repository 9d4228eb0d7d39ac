"""`dora-fx finetune` on samples of every format: its command line, and what it says of the data."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml

from dora_fx.app.data.base_tokenizer import BaseTokenizer
from dora_fx.app.data.formats import FORMATS
from dora_fx.app.data.training_data import read_data
from dora_fx.app.options.finetune_options import FinetuneOptions
from dora_fx.app.training.text_sequences import training_text, with_steps
from tests.chat_templates import HEADERS, TOOLS, unmarked
from tests.closeness import assert_close, rounding
from tests.finetune_runs import ROUNDINGS_OF_A_STEP, finetune, rows, step_of
from tests.hf_models import tiny_hf_config, tiny_tokenizer
from tests.sample_files import SAMPLES, options, texts, write, write_inputs
from tests.tables import every_case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of every run here."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# The other formats become the same tokens (`test_data_masks.py`).
@pytest.mark.parametrize("name", ["messages", "sharegpt", "prompt-completion", "alpaca"])
def test_every_format_is_learned(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert finetune(*options(folder, f"{name}.jsonl", "--run", run, "--steps", 30, "--batch-size", 2)) == 0
    held_out = rows(run, "held_out_loss")
    assert held_out[30] < held_out[0] - 1.0
    shown = capsys.readouterr().out
    assert f"{name}: 40 samples of " in shown and ", packed, " in shown
    first = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    # The sample answers what is held out, from where the answer starts.
    assert first["prompt"].replace(" ", "").endswith({"prompt-completion": "?"}.get(name, "(assistant)\n"))


def test_the_mask_of_a_sample_is_shown_and_nothing_is_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(folder / "base", tmp_path / "weightless")
    (base / "model.safetensors").unlink()
    shown_with = options(folder, "messages.jsonl", "--run", tmp_path / "run", "--show-sample", base=str(base))
    assert finetune(*shown_with) == 0
    shown = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "run").exists()
    start = next(index for index, line in enumerate(shown) if "tokens, " in line and "line 1" in line)
    assert shown[start] == f"{folder / 'messages.jsonl'}, line 1: 33 tokens, 4 of them learned"
    first, second, third = shown[start + 1 :]
    assert first.split()[:3] == ["given", "28", "tokens"] and "( a s s i s t a n t )" in first
    assert second.split()[:3] == ["learned", "4", "tokens"] and second.endswith("'d o g <e>'")
    assert third.split()[:3] == ["given", "1", "token"] and third.endswith(r"'\n'")


def test_calls_and_turns_that_are_not_learned_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask, answer = {"role": "user", "content": "say dog"}, {"role": "assistant", "content": "dog", "train": False}
    call = {
        "role": "assistant",
        "id": 3,
        "content": "",
        "tool_calls": [{"name": "bark", "arguments": '{"times": "two"}'}],
    }
    data = write(folder / "calls.jsonl", [{"messages": [ask, answer, ask, call]}] * 3)
    template = folder / "base" / "chat_template.jinja"
    before = template.read_text()
    try:
        for name, code in ((unmarked(TOOLS), 0), (before, 2)):
            template.write_text(name)
            assert finetune(*options(folder, data, "--show-sample")) == code
    finally:
        template.write_text(before)
    shown = capsys.readouterr()
    assert "fields of turns that the chat template leaves out: id\n" in shown.out
    lines = shown.out.splitlines()
    start = next(index for index, line in enumerate(lines) if "line 1: " in line and "of them learned" in line)
    given, learned, end = lines[start + 1 : start + 4]
    assert given.split()[0] == end.split()[0] == "given" and "d o g <e>" in given
    call_text = "( c a l l ) b a r k   ? ? t i m e s ? ?   ? t w o ? ? ( e n d ) <e>"
    assert learned.split()[0] == "learned" and call_text in learned, learned
    assert f"--data {data}, line 1, message 4: the base's chat template leaves out tool_calls of this" in shown.err


def test_packed_and_padded_runs_learn_alike(folder: Path, tmp_path: Path) -> None:
    """One step over everything is the same step, however samples lie in sequences."""
    sizes = read_sizes(folder, "messages.jsonl")
    for name, more in (("packed", []), ("padded", ["--no-packing"])):
        accumulation = sizes[name]
        steps = ("--steps", 2, "--gradient-accumulation", accumulation, "--lr", 1e-3, "--sample-tokens", 0)
        assert finetune(*options(folder, "messages.jsonl", "--run", tmp_path / name, *steps, *more)) == 0
    assert sizes["packed"] < sizes["padded"] == 38
    for key in ("loss", "grad_norm"):
        found, expected = (torch.tensor(list(rows(tmp_path / name, key).values())) for name in sizes)
        assert_close(found, expected, rounding(torch.float32, 2 * ROUNDINGS_OF_A_STEP))
    held_out = [torch.tensor(list(rows(tmp_path / name, "held_out_loss").values())) for name in sizes]
    assert_close(*held_out, rounding(torch.float32, 2 * ROUNDINGS_OF_A_STEP))


def read_sizes(folder: Path, data: str) -> dict[str, int]:
    """Training sequences, packed and padded."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = unmarked(HEADERS)
    found = {}
    for name in ("packed", "padded"):
        chosen = FinetuneOptions(data=folder / data, sequence_length=120, no_packing=name == "padded", sample_tokens=3)
        base = BaseTokenizer(folder / "base", tokenizer, 64)
        text = training_text(chosen, read_data(folder / data, "auto"), base, tiny_hf_config(), "cpu")
        found[name] = len(text.sequences.train)
    return found


def test_a_compiled_run_goes_through_the_losses_of_an_eager_one(folder: Path, tmp_path: Path) -> None:
    more = ("--steps", 6, "--lr", 1e-3, "--batch-size", 2, "--sample-tokens", 0)
    for name, how in (("eager", ()), ("layer", ("--compile", "layer")), ("model", ("--compile", "model"))):
        how = (*how, "--inner-compiler", "aot_eager")
        assert finetune(*options(folder, "messages.jsonl", "--run", tmp_path / name, *more, *how)) == 0
    losses = {name: torch.tensor(list(rows(tmp_path / name).values())) for name in ("eager", "layer", "model")}
    for name in ("layer", "model"):
        assert_close(losses[name], losses["eager"], rounding(torch.float32, 6 * ROUNDINGS_OF_A_STEP))


def test_epochs_are_so_many_passes_and_a_resumed_run_may_have_more(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, num_sequences = tmp_path / "run", read_sizes(folder, "messages.jsonl")["packed"]
    assert finetune(*options(folder, "messages.jsonl", "--run", run, "--epochs", 1.5, "--batch-size", 2)) == 0
    steps = -(-3 * num_sequences // 4)
    assert step_of(run) == steps == len(rows(run))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["steps"] == steps and saved["epochs"] is None
    assert finetune("--resume", run, "--epochs", 2) == 0
    assert step_of(run) == num_sequences
    assert finetune("--resume", run, "--steps", num_sequences + 1) == 0
    assert step_of(run) == num_sequences + 1
    assert finetune("--resume", run, "--epochs", 1) == 2
    assert f"was saved at step {num_sequences + 1}; expected more" in capsys.readouterr().err


@every_case(("epochs", "batch", "accumulation", "steps"), [(1, 1, 1, 10), (2, 4, 1, 5), (0.01, 1, 1, 1), (3, 2, 2, 8)])
def test_steps_of_epochs(epochs: float, batch: int, accumulation: int, steps: int) -> None:
    chosen = FinetuneOptions(demo="text", epochs=epochs, batch_size=batch, gradient_accumulation=accumulation)
    found = with_steps(chosen, 10)
    assert found.steps == steps and found.epochs is None
    assert with_steps(found, 10) is found


def test_steps_and_epochs_of_one_place_are_refused_and_the_command_line_wins(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = options(folder, "messages.jsonl")
    assert finetune(*data, "--steps", 3, "--epochs=2") == 2
    assert "--epochs: found --steps beside it in the command line, expected one" in capsys.readouterr().err
    config = tmp_path / "a.yaml"
    config.write_text("steps: 3\nepochs: 2\n")
    assert finetune(*data, "--config", config) == 2
    assert f"--epochs: found --steps beside it in --config {config}" in capsys.readouterr().err
    config.write_text("epochs: 2\n")
    assert finetune(*data, "--config", config, "--steps", 1, "--run", tmp_path / "run") == 0
    assert step_of(tmp_path / "run") == 1
    for value in ("0", "-1", ".inf", ".nan"):
        assert finetune(*data, "--epochs", value) == 2
        assert "--epochs: found" in capsys.readouterr().err


def test_samples_longer_than_a_sequence_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [SAMPLES["messages"]("a " * count, "bc " * count) for count in (2, 3, 10, 4, 12)]
    data = write(tmp_path / "long.jsonl", long)
    counted = "2 of 5 samples are longer than the 64 tokens of a sequence, the longest has 83"
    base = options(folder, data, "--show-sample", "--sequence-length", 64)
    assert finetune(*base) == 0
    shown = capsys.readouterr().out
    assert f"{counted}: they are left out; they fit with --sequence-length 83" in shown and ": 3 samples of" in shown
    assert finetune(*base, "--too-long", "cut") == 0
    shown = capsys.readouterr().out
    assert f"{counted}: they are cut; 0 of them have nothing left to learn" in shown and ": 5 samples of" in shown
    assert finetune(*base, "--too-long", "cut", "--sequence-length", 42) == 0
    assert "they are cut; 1 of them have nothing left to learn and are left out" in capsys.readouterr().out
    assert finetune(*base, "--too-long", "error") == 2
    message = f"{data}, line 3: found 73 tokens; {counted}; take --sequence-length 83, or --too-long drop or cut"
    assert message in capsys.readouterr().err
    assert finetune(*base, "--sequence-length", 8) == 2
    assert "5 of 5 samples are longer than the 8 tokens of a sequence" in capsys.readouterr().err
    assert finetune(*base, "--sequence-length", 83) == 0
    assert "the longest has" not in capsys.readouterr().out


def test_a_prompt_is_a_question_where_a_template_asks_it(folder: Path, tmp_path: Path) -> None:
    for name, data, expected in (
        ("chat", "messages.jsonl", "( u s e r ) \n s a y   o w l <e> \n ( a s s i s t a n t ) \n"),
        ("completion", "prompt-completion.jsonl", "s a y   o w l"),
    ):
        more = ("--run", tmp_path / name, "--steps", 1, "--prompt", "say owl")
        assert finetune(*options(folder, data, *more)) == 0
        assert json.loads((tmp_path / name / "samples.jsonl").read_text().splitlines()[0])["prompt"] == expected


def test_a_folder_of_parquet_files_is_trained_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network, and with nothing written beside the run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket.socket, "connect", None)
    (tmp_path / "data").mkdir()
    for part in range(2):
        records = [SAMPLES["messages"](*texts(number)) | {"source": "x"} for number in range(part * 10, part * 10 + 10)]
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "data" / f"train-{part}.parquet")
    assert finetune(*options(folder, tmp_path / "data", "--steps", 2, "--run", tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert "messages: 20 samples of" in shown and "fields of the data that are not used: source" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_a_csv_file_with_columns_of_its_own_is_trained_on_and_resumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [",".join(texts(number)) for number in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["Frage,Antwort", *rows]))
    columns = ("--columns", "question=Frage", "answer=Antwort")
    more = ("--learning_rate", 0.01, "--adam-beta2", 0.99, "--steps", 1, "--run", tmp_path / "run")
    given = [each for each in options(folder, tmp_path / "a.csv", *columns, *more) if each != "--lr"]
    given.remove(0.01)
    assert finetune(*given) == 0
    assert "question-answer: 20 samples of" in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["columns"] == {"question": "Frage", "answer": "Antwort"}
    assert (saved["lr"], saved["adam_beta2"]) == (0.01, 0.99)
    assert finetune("--resume", tmp_path / "run", "--steps", 2) == 0
    assert step_of(tmp_path / "run") == 2
    assert finetune("--resume", tmp_path / "run", "--steps", 3, "--columns", "prompt=Frage", "completion=Antwort") == 2
    assert "--columns: found {'prompt': 'Frage', 'completion': 'Antwort'}, but the run to" in capsys.readouterr().err


def test_the_page_s_record_and_command_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (record,) = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^\$ dora-fx finetune (.*)$", page, re.MULTILINE)
    (tmp_path / "base").symlink_to(folder / "base")
    (tmp_path / "chat.jsonl").write_text(record * 2)
    monkeypatch.chdir(tmp_path)
    assert finetune(*shlex.split(command)) == 0
    assert "chat.jsonl, line 1: " in capsys.readouterr().out
    assert all(f"| `{name}` |" in page for name in FORMATS)
