"""The first lines that a newcomer sees: imports that say nothing, help at once, and hints for what is misspelled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dora_fx
from dora_fx.app.cli.commands import COMMANDS
from dora_fx.app.cli.main import main
from dora_fx.app.options.command_line import with_hint, with_lists
from tests.tables import every_case

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "transformers", "numpy", "matplotlib", "rich")


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, whose warnings are Python's default."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings)


def test_importing_every_public_name_and_what_the_command_needs_says_nothing() -> None:
    done = python(
        "from dora_fx import *\nimport dora_fx.backend, dora_fx.models, dora_fx.app.cli.finetune, dora_fx.app.cli.chat"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_imports_nothing_heavy_and_its_names_are_there() -> None:
    done = python(f"import sys, dora_fx; print([name for name in {HEAVY} if name in sys.modules]); print(dir(dora_fx))")
    assert done.stdout.startswith("[]\n") and done.stderr == ""
    assert all(f"'{name}'" in done.stdout for name in dora_fx.__all__)
    for name in dora_fx.__all__:
        assert getattr(dora_fx, name) is getattr(dora_fx, name)
    with pytest.raises(AttributeError, match="module 'dora_fx' has no attribute 'doraa'"):
        dora_fx.doraa  # noqa: B018


def test_a_user_s_own_filters_of_warnings_come_first() -> None:
    """A warning that a library was imported without another one is shown to whoever asks for all of them."""
    warn = (
        "warnings.warn_explicit('A and B are not installed. Slow.', UserWarning, 'x.py', 1, module='megatron.core.x')"
    )
    assert python(f"import warnings, dora_fx; {warn}").stderr == ""
    assert "are not installed" in python(f"import warnings, dora_fx; warnings.simplefilter('always'); {warn}").stderr
    other = warn.replace("are not installed", "are deprecated")
    assert "are deprecated" in python(f"import warnings, dora_fx; {other}").stderr


@every_case("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_needs_no_library_that_takes_long(arguments: list[str]) -> None:
    code = f"""
import sys
from dora_fx.app.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    done = python(code, *arguments, COLUMNS="40", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and done.stdout.endswith("\n[]\n") and done.stderr == ""
    help = done.stdout.removesuffix("[]\n")
    assert help.isascii()
    if "--help" in arguments:
        assert help.startswith("usage: dora-fx")


@every_case(
    ("arguments", "hint"),
    [
        (["finetune", "--demo", "--peak-lr", "1"], "--peak-lr 1; did you mean --lr?"),
        (["finetune", "--demo", "--gradient_accumulation_steps", "2"], "did you mean --gradient-accumulation?"),
        (["finetune", "--demo", "--lr-scheduler-type", "linear"], "did you mean --schedule?"),
        (["finetune", "--demo", "--max-seq-length", "64"], "did you mean --sequence-length?"),
        (["finetune", "--demo", "--resume_from_checkpoint", "x"], "did you mean --resume?"),
        (
            ["finetune", "--demo", "--report_to", "wandb", "--warmup_ratio", "0.1"],
            "did you mean --log and --warmup-steps?",
        ),
        (["finetune", "--demo", "--adam-beta3", "1"], "did you mean --adam-beta"),
        (["finetune", "--demo", "--stepz", "3"], "--stepz 3; did you mean --steps?"),
        (["finetune", "--demo", "--step", "3"], "--step 3; did you mean --steps?"),
        (["finetune", "--demo", "--target_module", "x"], "did you mean --target-modules?"),
        (["finetune", "--demo", "--rank=8", "--output=8"], "did you mean --dim and --run?"),
        (["finetune", "--model", "x"], "did you mean --base?"),
        (["merge", "x", "--output-dir", "x"], "did you mean --to?"),
        (["export", "x", "--to", "y", "--basename", "z"], "did you mean --base-name?"),
        (["chat", "x", "--max-tokens", "9"], "did you mean --max-new-tokens?"),
        (["finetun", "--demo"], "did you mean finetune?"),
        (["finetune", "--demo", "--load-in", "4bit"], "transformers' Trainer, as docs/quantised.md"),
        (["finetune", "--demo", "--load_in_8bit=true"], "transformers' Trainer, as docs/quantised.md"),
        (["finetune", "--demo", "--zzzz", "3"], "unrecognized arguments: --zzzz 3\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelled_option_has_a_hint(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert hint in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_misspelled_key_of_a_file_of_options_has_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 1\n")
    assert main(["finetune", "--demo", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "'learning_rate'; did you mean --lr?" in capsys.readouterr().err


def test_a_hint_names_only_what_there_is() -> None:
    assert with_hint("unrecognized arguments: --learning-rate 1", ["steps"]).endswith("--learning-rate 1")
    assert with_hint("Expected int. Got value: two", ["steps"]) == "Expected int. Got value: two"


@every_case(
    ("given", "expected"),
    [
        (["--t", "a,b"], '["a", "b"]'),
        (["--t=a,b"], '["a", "b"]'),
        (["--t", "a", "b,c"], '["a", "b", "c"]'),
        (["--t", "a, b,"], '["a", "b"]'),
        (["--t", "*.layers.0.*"], '["*.layers.0.*"]'),
        (["--t", "[a, b]"], "[a, b]"),
        (["--t", ""], "[]"),
    ],
)
def test_lists_are_taken_with_commas_spaces_and_brackets(given: list[str], expected: str) -> None:
    rest = ["--steps", "3", "x,y"]
    assert with_lists([*rest, *given, *rest], {"--t"}) == [*rest, "--t", expected, *rest]
    assert with_lists(given, {"--t"}) == ["--t", expected]
