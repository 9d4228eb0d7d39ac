"""A base that is refused, by the library and by the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_fx.app.cli.main import main
from dora_fx.models import load_hf_checkpoint


def refused(path: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both refuse a base before anything is written; the command in one line, with a cure after a semicolon."""
    with pytest.raises((ValueError, OSError), match=message) as raised:
        load_hf_checkpoint(path)
    text = path.parent / "text.txt"
    text.write_text("the quick brown fox " * 100)
    run = path.parent / "run"
    capsys.readouterr()
    assert main(["finetune", "--base", str(path), "--data", str(text), "--run", str(run), "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown == f"dora-fx: error: --base {path}: {raised.value}\n"
    assert str(path) in str(raised.value) and "; " in str(raised.value)
    assert not run.exists()
