"""What the command shows: on terminals of any width and encoding, in a pipe, and in its picture."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from dora_fx.app.runs.loss_curve import draw_loss_curve
from dora_fx.app.runs.progress import Display
from dora_fx.app.runs.step_metrics import StepMetrics
from tests.tables import every_case

ROWS = [
    {"step": 0, "held_out_loss": 3.0},
    *({"step": step, "loss": 3.0 - step / 10, "tokens": 256, "seconds": 0.5} for step in range(1, 6)),
    {"step": 5, "held_out_loss": 2.5},
]


def shown(width: int, encoding: str, *, is_terminal: bool) -> str:
    """Everything that a display writes about a phase, a download and five steps."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    display = Display(Console(file=stream, width=width, force_terminal=is_terminal, color_system=None))
    with display.phase("measuring the held-out loss (and compiling for it, once)"):
        pass
    with display.download("downloading SmolLM2-135M from PyPI, once", 92_871_040) as show:
        show(46_000_000)
    with display.training(0, 5) as steps:
        for step in range(1, 6):
            steps.show(StepMetrics(step, 2.5, 1e-3, 1.0, 256, 0.5))
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


@every_case("encoding", ["ascii", "latin-1", "utf-8"])
@every_case("width", [30, 40, 79, 80, 200])
def test_steps_fit_a_terminal_of_any_width_and_encoding(width: int, encoding: str) -> None:
    """The stream is strict: a letter that the encoding lacks would raise."""
    lines = shown(width, encoding, is_terminal=True).replace("\r", "\n").split("\n")
    bars = [line for line in lines if "/5 " in line]
    assert any("5/5 loss 2.5000" in line for line in bars)
    plain = [line.replace("\x1b[2K", "").replace("\x1b[?25h", "").rstrip() for line in bars]
    assert max(map(len, plain)) <= width
    assert any("left" in line for line in plain)
    assert any("tokens/s" in line for line in plain) == (width >= 80)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_pipe_has_plain_lines(encoding: str) -> None:
    text = shown(40, encoding, is_terminal=False)
    assert "\x1b" not in text and "\r" not in text
    assert "downloading SmolLM2-135M from PyPI, once (93 MB) ...\n" in text and "downloaded 93 MB: " in text
    assert "step 5/5  loss 2.5000  512 tokens/s" in text


def test_a_pipe_is_never_silent_for_long() -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=40), longest_silence_s=0.01)

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in stream.getvalue():
            assert time.monotonic() < deadline, stream.getvalue()
            time.sleep(0.005)

    with display.never_silent():
        wait_for("at work\n")
        with display.phase("measuring"):
            wait_for("measuring ... 0 s so far\n")
        with display.training(0, 50) as steps:
            wait_for("step 0/50  0 s ago\n")
            # Steps 1, 2 and 4 of fifty have a line of their own.
            for step in (1, 2, 3):
                steps.show(StepMetrics(step, 2.5, 1e-3, 1.0, 256, 0.5))
            wait_for("step 3/50  loss 2.5000  512 tokens/s  0:00:24 left  0 s ago\n")
        with display.download("downloading", 93_000_000) as show:
            show(46_000_000)
            wait_for("downloading ... 46 of 93 MB\n")
    size = len(stream.getvalue())
    time.sleep(0.05)
    assert len(stream.getvalue()) == size


def test_the_picture_has_a_title_and_two_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    # Dollars would begin a formula in a title.
    draw_loss_curve(ROWS, "base $_$ on text: DoRA of rank 4", tmp_path / "loss.png")
    ((losses, speed),) = (figure.axes for figure in figures)
    assert losses.get_title("left") == "base $_$ on text: DoRA of rank 4"
    assert losses.get_ylabel() == "loss (nats per token)" and speed.get_ylabel() == "tokens/s"
    assert speed.get_xlabel().startswith("optimizer step")
    curves = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert curves["held out"] == [3.0, 2.5]
    assert curves["training, each step"] == [row["loss"] for row in ROWS if "loss" in row]
    # Smoothed from thirty steps on: an average lags behind the loss of a shorter run.
    assert "training, smoothed" not in curves
    assert list(speed.get_lines()[0].get_ydata()) == [512.0] * 5
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    draw_loss_curve([{"step": step, "loss": 3.0 - step / 30} for step in range(30)], "long", tmp_path / "loss.png")
    curves = {line.get_label(): list(line.get_ydata()) for line in figures[1].axes[0].get_lines()}
    assert curves["training, smoothed"][0] == pytest.approx(3.0)
    assert curves["training, each step"][-1] < curves["training, smoothed"][-1] < 2.5


@every_case("rows", [[], [{"step": 0, "held_out_loss": 3.0}], [{"step": 1, "loss": 2.0}]])
def test_a_picture_of_little_is_drawn(rows: list[dict[str, float]], tmp_path: Path) -> None:
    """Rows of an earlier version have no seconds, and a run that was stopped at once has no rows."""
    draw_loss_curve(rows, "a title", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
