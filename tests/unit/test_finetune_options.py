"""Options of `dora-fx finetune`: precedence, checks, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dora_fx.app.cli.main import main, parse
from dora_fx.app.cli.option_order import options_in_order
from dora_fx.app.errors import UserError
from dora_fx.app.options import DEMO_DEFAULTS, FinetuneOptions, check_resumable, options_from, saved_options
from dora_fx.app.options.command_line import aliases_of
from dora_fx.app.training.adapter_optimizer import learning_rate
from dora_fx.checkpoint.manifest import Manifest
from tests.tables import every_case


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail with exit code 2, one line and no traceback."""
    assert main(["finetune", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().split("\n")
    assert line.startswith("dora-fx: error: ")
    return line.removeprefix("dora-fx: error: ")


@every_case(
    ("arguments", "message"),
    [
        (["--demo", "--steps", "0"], "--steps: found 0, expected a positive integer"),
        (["--demo", "--lr", ".nan"], "--lr: found nan, expected a positive number"),
        (["--demo", "--held-out-fraction", "1"], "--held-out-fraction: found 1.0, expected a number between 0 and 1"),
        (["--demo", "--dim", "0"], "DoRA.dim: found 0, expected a positive integer"),
        (["--demo", "--alpha", ".nan"], "DoRA.alpha: found nan, expected a positive finite number"),
        (["--demo", "--dropout", "1"], "DoRA.dropout: found 1.0, expected a probability in [0, 1)"),
        (["--demo", "--ep", "0"], "--ep: found 0, expected a positive integer"),
        (["--demo", "--etp", "-1"], "--etp: found -1, expected a positive integer"),
        (
            ["--demo", "--ep", "2"],
            "--ep: found 2 with --etp 1, expected a product that divides the 1 ranks",
        ),
        (
            ["--demo", "--dp", "2", "--gradient-accumulation", "2", "--ep", "2", "--etp", "2"],
            "--ep: found 2 with --etp 2, expected a product that divides the 2 ranks",
        ),
        (["--demo", "--data", "x.txt"], "--demo brings its own data; leave out --data, or --demo"),
        ([], "nothing to train on; give --data FILE, or --demo for data that come along"),
        (["--demo", "--base", "nowhere"], "nowhere: no such file or directory; expected one, or a model of"),
        (["--demo", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--demo", "--schedule", "square"], "--schedule: Expected Literal['constant', 'linear', 'cosine']"),
        (
            ["--demo", "--data-format", "alpaca"],
            "--data-format: found alpaca beside --demo, whose data have their own format",
        ),
        (
            ["--target-modules", "a", "--target-modules", "b"],
            "--target-modules: found it twice, expected all of its parts",
        ),
        (["--demo", "robot"], "--demo: found the demo 'robot', expected pirate or text"),
        (["--demo", "--batch-size", "two"], "--batch-size: Expected int. Got value: two"),
        (["--resume", "nowhere"], "--resume nowhere: there is no config.yaml, expected the folder of a saved run"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, *arguments)


@every_case(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt: No such file or directory"),
        ("a.txt", b"", "a.txt: the file has no text"),
        ("a.txt", b" \n\t", "a.txt: the file has no text"),
        ("a.txt", b"abc \xff def", "a.txt, line 1: not UTF-8 at byte 4"),
        ("a.tsv", b"abc", "a.tsv: found a .tsv file, expected .txt, .jsonl, .json, .csv or .parquet"),
        ("a.jsonl", b"", "a.jsonl: the file has no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2: cannot be read (JSONDecodeError: "),
        (
            "a.jsonl",
            b'\n{"txt": "x"}',
            "a.jsonl, line 2: found the fields 'txt', expected those of a format; the nearest is text",
        ),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: found 3 in the field text, expected a string"),
        ("a.jsonl", b"[]", "a.jsonl, line 1: found a list, expected an object with fields such as text"),
    ],
)
def test_unusable_text_is_named_before_anything_is_loaded(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    # The base does not exist either, and would be named if it were looked at first.
    assert message in error_of(capsys, "--data", str(tmp_path / name), "--base", "nowhere")


@every_case(
    ("content", "message"),
    [
        (b"\xff\xfe", "a.yaml: cannot be read (UnicodeDecodeError: "),
        (b"[", "a.yaml: cannot be read (ParserError: "),
        (b"- 1", "a.yaml: found a list, expected options by their names in YAML"),
        (b"", "a.yaml: found a NoneType, expected options by their names in YAML"),
        (b"steps: two", "--steps: Expected int. Got value: two"),
    ],
)
def test_a_file_of_options_that_is_none_is_named(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    assert message in error_of(capsys, "--demo", "--config", str(tmp_path / "a.yaml"))
    assert "found a directory, expected a regular file" in error_of(capsys, "--demo", "--config", str(tmp_path))


@every_case(
    ("rank", "world_size", "local_rank", "message"),
    [
        (
            "x",
            "1",
            "0",
            "RANK: found 'x' in the environment, expected a number from 0; start the command with torchrun",
        ),
        ("0", "", "0", "WORLD_SIZE: found '' in the environment, expected a number from 0"),
        ("0", "1", "0.5", "LOCAL_RANK: found '0.5' in the environment"),
        ("-1", "1", "0", "RANK: found '-1' in the environment"),
        ("\u0663", "4", "0", "RANK: found '\u0663' in the environment"),
        ("1", "1", "0", "RANK: found 1 in the environment, expected a number below WORLD_SIZE, which is 1; start"),
        ("0", "0", "0", "RANK: found 0 in the environment, expected a number below WORLD_SIZE, which is 0"),
        ("0", "9" * 5000, "0", "WORLD_SIZE: found '99999"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_an_environment_that_no_launcher_makes_is_named(
    rank: str,
    world_size: str,
    local_rank: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, value)
    assert main(["finetune", "--demo", "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@every_case(
    ("address", "port", "message"),
    [
        (None, "1", "MASTER_ADDR expected, but not set"),
        ("localhost", "x", "invalid literal for int"),
        ("localhost", "99999999", "port"),
    ],
)
def test_ranks_that_cannot_meet_say_so(
    address: str | None, port: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    found = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=port)
    for name, value in (found if address is None else found | dict(MASTER_ADDR=address)).items():
        monkeypatch.setenv(name, value)
    assert main(["finetune", "--demo", "--tp", "2", "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert "error: the processes of the run do not find each other (" in shown and shown.count("\n") == 1
    assert message in shown and "; start the command with torchrun" in shown


@every_case("processes", [2, 3, 8])
def test_torchrun_without_a_parallel_size_advises_one(
    processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", 0), ("WORLD_SIZE", processes), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    assert f"found {processes} processes and no --tp; give --tp {processes} to" in error_of(capsys, "--demo")


def test_the_demo_has_defaults_of_its_own_below_whatever_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("demo: text\neval_every: 7\n")
    given = (["--demo"], ["--config", str(tmp_path / "a.yaml"), "--steps", "9"], ["--data", "x.txt"])
    demo, mixed, other = (parse(["finetune", *arguments])[1] for arguments in given)
    assert (DEMO_DEFAULTS["pirate"] | {"demo": "pirate"}).items() <= demo.items()
    assert (mixed["steps"], mixed["eval_every"], mixed["prompt"]) == (9, 7, DEMO_DEFAULTS["text"]["prompt"])
    assert other["prompt"] is None and other["steps"] == FinetuneOptions(demo="text").steps
    # The curve of a demo has points between its ends, and the last step is measured anyway.
    for name, defaults in DEMO_DEFAULTS.items():
        options = FinetuneOptions(demo=name, **defaults)
        assert 3 <= options.steps // options.measuring_interval <= 10


def test_files_of_options_from_before_the_pirate_are_understood(tmp_path: Path) -> None:
    for written, name in (("true", "text"), ("false", "none")):
        (tmp_path / "a.yaml").write_text(f"demo: {written}\ndata: {'x.txt' if written == 'false' else 'null'}\n")
        parsed = parse(["finetune", "--config", str(tmp_path / "a.yaml")])[1]
        options = options_from(parsed)
        assert options.demo == name and parsed["prompt"] == DEMO_DEFAULTS.get(name, {}).get("prompt")
        saved = saved_options(options)
        check_resumable(options, saved | {"demo": written == "true"})
        with pytest.raises(UserError, match="--demo: found"):
            check_resumable(options, saved | {"demo": written != "true"})


def test_a_folder_that_exists_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "--demo", "--run", str(tmp_path))
    assert message == f"--run {tmp_path}: it exists; choose another name, or go on with --resume {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no config.json" in error_of(capsys, "--demo", "--base", str(tmp_path))
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    assert "found a .bin file, expected .gguf or a directory" in error_of(capsys, "--demo", "--base", str(file))


def test_a_broken_gguf_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model, and long enough to be read as a header")
    assert main(["finetune", "--demo", "--base", str(file), "--run", str(tmp_path / "run")]) == 2
    assert f"error: --base {file}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_of_the_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("stepz: 3\n")
    assert "stepz" in error_of(capsys, "--demo", "--config", str(config))


def test_a_config_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    assert str(config) in error_of(capsys, "--demo", "--config", str(config))
    config.write_text("steps: [\n")
    assert "config" in error_of(capsys, "--demo", "--config", str(config))


@pytest.mark.parametrize("order", [["--steps", "-1", "--config"], ["--config"]])
def test_the_command_line_wins_wherever_the_config_stands(
    order: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("demo: text\nsteps: -2\n")
    found = "-1" if "--steps" in order else "-2"
    assert f"--steps: found {found}" in error_of(capsys, *order, str(config))


def test_configs_come_before_options_and_a_resumed_run_before_both(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 9\n")
    (tmp_path / "checkpoint").mkdir()
    layout = dict.fromkeys(("tp", "pp", "vpp", "cp", "dp", "sequence_parallel"), 1)
    Manifest("id", {}, layout, False, {}, {}, {}, False, False, {}).write(tmp_path / "checkpoint")
    arguments = ["--steps", "3", "--config=mine.yaml", "--resume", str(tmp_path)]
    assert options_in_order(arguments) == [
        f"--config={tmp_path / 'config.yaml'}",
        "--config=mine.yaml",
        "--steps",
        "3",
        f"--resume={tmp_path}",
    ]


def test_saved_options_are_plain_yaml_and_give_the_same_options() -> None:
    options = FinetuneOptions(data=Path("/text.txt"), run=Path("folder"), dim=4)
    loaded = yaml.safe_load(yaml.safe_dump(saved_options(options)))
    assert loaded["data"] == "/text.txt" and "run" not in loaded and "resume" not in loaded
    check_resumable(FinetuneOptions(data=Path("/text.txt"), dim=4, resume=Path("folder"), steps=90), loaded)


def test_a_resumed_run_cannot_become_another_one() -> None:
    saved = saved_options(FinetuneOptions(demo="text"))
    with pytest.raises(UserError, match="--dim: found 4, but the run to resume was started with 16"):
        check_resumable(FinetuneOptions(demo="text", dim=4), saved)
    with pytest.raises(UserError, match="--run: leave it out"):
        check_resumable(FinetuneOptions(demo="text", run=Path("other")), saved)


def test_learning_rate_warms_up_and_follows_its_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        options = FinetuneOptions(demo="text", steps=6, warmup_steps=2, lr=1.0, schedule=schedule)  # type: ignore[arg-type]
        return [round(learning_rate(step, options), 4) for step in range(6)]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == [0.5, 1, 1, 0.8536, 0.5, 0.1464]


def test_names_of_other_trainers_are_taken_where_they_mean_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    of_transformers = (
        "--model_name_or_path base --train-file a.txt --output_dir run --learning-rate 2e-4 --num_train_epochs=3 "
        "--per_device_train_batch_size 4 --weight_decay 0.1 --max_grad_norm 0.5 --adam_beta1 0.8 --adam-beta2=0.95 "
        "--adam_epsilon 1e-6 --eval_steps 5 --save-steps 6 --gradient_checkpointing --lora_r 8 --lora-alpha 16 "
        "--lora_dropout 0.1 --lora_target_modules linear_qkv,linear_proj"
    )
    ours = (
        "--base base --data a.txt --run run --lr 2e-4 --epochs 3 --batch-size 4 --weight-decay 0.1 --max-grad-norm 0.5 "
        "--adam-beta1 0.8 --adam-beta2 0.95 --adam-eps 1e-6 --eval-every 5 --save-every 6 --recompute "
        "--dim 8 --alpha 16 --dropout 0.1 --target-modules linear_qkv linear_proj"
    )
    of_megatron = (
        "--train-iters 7 --micro-batch-size 2 --seq-length 64 --lr-decay-style cosine --clip-grad 0.5 --demo "
        "--eval-interval 5 --save-interval 6 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 3"
    )
    ours_of_megatron = (
        "--steps 7 --batch-size 2 --sequence-length 64 --schedule cosine --max-grad-norm 0.5 --demo "
        "--eval-every 5 --save-every 6 --tp 2 --pp 3"
    )
    for written, expected in ((of_transformers, ours), (of_megatron, ours_of_megatron)):
        found = parse(["finetune", *written.split()])
        assert found == parse(["finetune", *expected.split()]) and found != parse(["finetune", "--demo"])
    for given, message in (
        (["--lr", "1", "--learning-rate=2"], "--learning-rate: found --lr beside it, the same option, expected one of"),
        (["--lora-r", "1", "--lora_rank", "2"], "--lora_rank: found --lora-r beside it, the same option"),
        (["--max-steps", "1", "--num-train-epochs", "2"], "--epochs: found --steps beside it in the command line"),
        (["--adam-beta2", "1"], "--adam-beta2: found 1.0, expected a number from 0 to 1, without 1"),
        (["--adam-epsilon", "0"], "--adam-eps: found 0.0, expected a positive number"),
    ):
        assert message in error_of(capsys, "--demo", *given)


def test_every_other_name_is_of_one_option_and_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name.replace("_", "-") for name in FinetuneOptions.__dataclass_fields__]
    taken = [alias for name in names for alias in aliases_of(name)]
    assert len({*names, *taken}) == len(names) + len(taken) > len(names) + 20
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = capsys.readouterr().out
    # Lines break at dashes, too.
    assert all(f"--{alias}" in "".join(shown.split()) for alias in taken)


def test_columns_are_taken_with_spaces_and_commas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"prompt": "the question", "completion": "a=b"}
    config = tmp_path / "a.yaml"
    config.write_text("columns: {prompt: the question, completion: a=b}")
    for given in (
        ["--columns", "prompt=the question", "completion=a=b", "--lr", "1"],
        ["--columns=prompt=the question,completion=a=b"],
        ["--columns", '{"prompt": "the question", "completion": "a=b"}'],
        ["--config", str(config)],
    ):
        assert parse(["finetune", "--data", "x", *given])[1]["columns"] == expected
    data = ["--data", str(tmp_path)]
    for given, message in (
        (["--columns"], "--columns: Expected dict"),
        (["--columns", "prompt"], "--columns: found 'prompt', expected a name on each side of =, such as prompt=quest"),
        (["--columns", "prompt=", "text=a"], "--columns: found prompt=, expected a field and a column, such as"),
        (["--columns", "prompt=a", "prompt=b"], "--columns: found prompt=a and prompt=b, expected one of them"),
        (["--columns", "prompt=a", "completion=a"], "--columns: found the column 'a' for prompt and completion, expe"),
        (["--columns", "promt=a"], "--columns: found 'promt' in front of =, expected a field of a format: text, "),
    ):
        assert message in error_of(capsys, *data, *given)
    assert "--columns: found --demo beside it" in error_of(capsys, "--demo", "--columns", "text=a")
    saved = yaml.safe_load(yaml.safe_dump(saved_options(FinetuneOptions(data=Path("x"), columns=expected))))
    check_resumable(FinetuneOptions(data=Path("x"), columns=expected, resume=Path("run")), saved)
    with pytest.raises(UserError, match=r"--columns: found {}, but the run to resume was started with {'completion': "):
        check_resumable(FinetuneOptions(data=Path("x"), resume=Path("run")), saved)


def test_every_option_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["finetune", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for name in FinetuneOptions.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
